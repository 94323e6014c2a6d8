"""HVQ-Trans' reconstruction network.

Lu et al., "Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly Detection", NeurIPS 2023,
https://arxiv.org/abs/2310.14228. Where the abstract and figures are silent this follows the released code, and says so.

The encoder's levels are replaced by prototypes (codes) of normal images before the decoder sees them, so that an anomaly
cannot pass. The codebooks, and the last linear layer, are switched by the class of the image: three parts of the network
are separate copies per class. With `selector="label"`, as released, the class is a label, **also at test time**.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.classifier import PooledClassifier
from models.layers.neck import ConcatenatedLevels
from models.layers.positions import LearnedPosition2d
from models.reconstruction import Pair
from models.released import renamed
from models.uniad import DecoderLayer, EncoderLayer

Selector = Literal["label", "classifier", "none"]
Switched = Literal["codebooks", "heads"]
Transport = Literal["off", "lowest", "all"]

EPSILON = 1e-5
"""Smoothing of the codes' counts (released code)."""


class Quantized(NamedTuple):
    """One level after quantisation.

    Args:
        tokens: (B, L, D) float32, the codes, with the gradient of what they replace (straight-through).
        indices: (B, L) int64, which code.
        commitment: float32 scalar, mean squared distance of the tokens to their codes.
        source: (B, L, D) float32, the tokens before.
    """

    tokens: Tensor
    indices: Tensor
    commitment: Tensor
    source: Tensor


class Restored(NamedTuple):
    """What the network makes of a batch: one pair at grid size, and each quantised level, by its number."""

    pair: Pair
    levels: dict[int, Quantized]

    @property
    def commitment(self) -> Tensor:
        """Sum of the levels' commitment terms, a float32 scalar; 0 without quantisation."""
        return sum((level.commitment for level in self.levels.values()), self.pair.target.new_zeros(()))


class HVQTrans(ConcatenatedLevels):
    """Levels in, one pair out: all levels resized to one grid and concatenated, and their reconstruction from codes.

    Args:
        channels: channels and (height, width) of each backbone level, as the feature extractor gives them.
        sizes: See `channels`.
        classes: how many classes (categories) of images there are.
        grid: (height, width) of the token grid; None = the size of the highest level given.
        d_model: channels of a token in the encoder; the decoder is twice as wide.
        heads: attention heads; they divide d_model.
        feedforward: width of the feed-forward part.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dropout: share dropped from attention weights, residual branches and inside the feed-forward part.
        codes: codes of one codebook (released: 512).
        decay: of the moving averages that the codes follow.
        hierarchy: how many of the encoder's levels are quantised and read by the decoder, from the highest down: all of
            them, encoder_layers + 1, if None. With 1, every decoder layer reads the highest level, twice side by side. 0 =
            nothing is quantised, the control that can copy its input.
        selector: what chooses codebooks and head. `label` (released): the true class, in training and test. `classifier`
            (the paper's text): the true class in training, a classifier's guess in eval mode. `none`: there is one codebook
            per level and one head for all classes.
        switched: which parts the selector switches; the others exist once.
        transport: the prototype-oriented transport score (POT) that is added to the map in eval mode: `off`, at the
            `lowest` level (released) or summed over `all` quantised levels.
        transport_weight: its weight (released: 80).
        transport_divisor: of the products of tokens and codes before the softmax; None = the number of codes, as released,
            so that another codebook size changes the temperature.

    Raises ValueError for unknown options and for widths that do not divide.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        classes: int,
        *,
        grid: tuple[int, int] | None = None,
        d_model: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        dropout: float = 0.1,
        codes: int = 512,
        decay: float = 0.99,
        hierarchy: int | None = None,
        selector: Selector = "label",
        switched: Sequence[Switched] = ("codebooks", "heads"),
        transport: Transport = "lowest",
        transport_weight: float = 80.0,
        transport_divisor: float | None = None,
    ) -> None:
        super().__init__()
        for option, value, allowed in (
            ("selector", selector, Selector),
            ("transport", transport, Transport),
            *(("switched", part, Switched) for part in switched),
        ):
            if value not in get_args(allowed):
                raise ValueError(f'{option} names "{value}"; choose from {", ".join(get_args(allowed))}.')
        if classes < 1:
            raise ValueError(f"HVQ-Trans needs at least one class of images, found {classes}.")
        if min(encoder_layers, decoder_layers) < 1:
            raise ValueError(
                f"HVQ-Trans needs at least one encoder and one decoder layer, found encoder_layers={encoder_layers}, "
                f"decoder_layers={decoder_layers}."
            )
        hierarchy = encoder_layers + 1 if hierarchy is None else hierarchy
        if not 0 <= hierarchy <= encoder_layers + 1:
            raise ValueError(
                f"hierarchy is {hierarchy}; {encoder_layers} encoder layers give levels {encoder_layers} to 0, so choose "
                f"0 (no quantisation) to {encoder_layers + 1} (all levels)."
            )
        if codes < 1 or not 0 <= decay < 1:
            raise ValueError(f"codes must be positive and decay in [0, 1), found codes={codes}, decay={decay}.")
        rows, columns = grid or sizes[-1]
        self.grid = (rows, columns)
        self.classes, self.selector = classes, selector
        self.transport, self.transport_weight, self.transport_divisor = transport, transport_weight, transport_divisor
        width_in = sum(channels)
        books = classes if selector != "none" and "codebooks" in switched else 1
        experts = classes if selector != "none" and "heads" in switched else 1

        self.position = LearnedPosition2d(d_model, self.grid)
        self.input_projection = nn.Linear(width_in, d_model)
        # The released code copies one prototype of each, so that all layers start equal.
        encoder_layer = EncoderLayer(d_model, heads, feedforward, dropout)
        decoder_layer = DecoderLayer(2 * d_model, heads, feedforward, dropout, query_length=0)
        self.encoder = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(copy.deepcopy(decoder_layer) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(2 * d_model)
        self.heads = nn.ModuleList(nn.Linear(2 * d_model, width_in) for _ in range(experts))
        top = encoder_layers
        self.lowest = min(top, top + 1 - hierarchy)
        quantised = range(top, self.lowest - 1, -1) if hierarchy else ()
        self.codebooks = nn.ModuleDict(
            {
                str(level): Codebooks(d_model if level == top else 2 * d_model, codes, books, decay)
                for level in quantised
            }
        )
        self.classifier = PooledClassifier(width_in, classes) if selector == "classifier" else None

    def forward(self, features: list[Tensor], classes: Sequence[int] | None = None) -> Restored:
        """features: (B, C_l, H_l, W_l) per level; classes: the class of each image, 0 to classes - 1.

        Classes are needed wherever the selector reads them: with `label` always, with `classifier` in training mode.
        In training mode the codebooks follow this batch; with several processes, the batches of all of them.
        """
        target = self.prepare(features)[0]
        chosen = self.select(target, classes)
        encoded = self.encode(target.flatten(2).transpose(1, 2))
        start, memories, levels = self.quantize(encoded, chosen)
        decoded = self.decode(start, memories)
        reconstruction = self.restore(decoded, chosen)
        return Restored(Pair(target, reconstruction.transpose(1, 2).unflatten(2, self.grid)), levels)

    def select(self, target: Tensor, classes: Sequence[int] | None) -> list[int] | Tensor:
        """The class that switches codebooks and head of each image of a batch (B, C, H, W), as int64 (B,) or a list.

        Outside training, a list of one class is for all images.
        """
        if self.selector == "none":
            return [0] * len(target) if self.training else [0]
        if self.selector == "classifier" and not self.training:
            return self.classifier(target)
        one = classes is not None and len(classes) == 1 and not self.training
        if not one and (classes is None or len(classes) != len(target)):
            raise ValueError(
                f"HVQ-Trans with selector={self.selector} needs the class of each of the {len(target)} images, found "
                f"{'none' if classes is None else len(classes)}."
            )
        outside = sorted({c for c in classes if not 0 <= c < self.classes})
        if outside:
            raise ValueError(f"Classes are numbered 0 to {self.classes - 1}, found {outside}.")
        return list(classes)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(B, L, C) to levels 0 (the projected tokens) to encoder_layers, each (B, L, d)."""
        x = self.input_projection(tokens)
        position = self.position()
        levels = [x]
        for layer in self.encoder:
            x = layer(x, position, None)
            levels.append(x)
        return levels

    def quantize(
        self, encoded: list[Tensor], classes: Sequence[int] | Tensor
    ) -> tuple[Tensor, list[Tensor], dict[int, Quantized]]:
        """The decoder's start and the memory of each of its layers, (B, L, 2d), and the quantised levels.

        The highest level is quantised first; its codes are joined to every other level before that is quantised.
        """
        top = len(encoded) - 1
        levels: dict[int, Quantized] = {}

        def quantised(level: int, x: Tensor) -> Tensor:
            if str(level) not in self.codebooks:
                return x
            levels[level] = self.codebooks[str(level)](x, classes)
            return levels[level].tokens

        highest = quantised(top, encoded[top])
        if self.lowest == top and self.codebooks:
            below = {top - 1: torch.cat([highest, highest], dim=-1)}
        else:
            lowest = self.lowest if self.codebooks else 0
            below = {
                level: quantised(level, torch.cat([encoded[level], highest], dim=-1))
                for level in range(top - 1, lowest - 1, -1)
            }
        read = list(below.values())
        return read[0], [read[min(layer, len(read) - 1)] for layer in range(len(self.decoder))], levels

    def decode(self, x: Tensor, memories: Sequence[Tensor]) -> Tensor:
        """The decoder's last, normalised layer, (B, L, 2d)."""
        position = self.position().repeat(1, 2)
        for layer, memory in zip(self.decoder, memories, strict=True):
            x = layer(x, memory, position, None, None)
        return self.norm(x)

    def restore(self, decoded: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
        """(B, L, 2d) to features (B, L, C) through the head of each image's class."""
        if len(self.heads) == 1:
            return self.heads[0](decoded)
        if isinstance(classes, Tensor):  # from the classifier
            weight = torch.stack([head.weight for head in self.heads])[classes]
            bias = torch.stack([head.bias for head in self.heads])[classes]
        else:  # a head that no image asks for gets no gradient, so that the optimiser leaves it alone
            weight = torch.stack([self.heads[c].weight for c in classes])  # (B or 1, C, 2d)
            bias = torch.stack([self.heads[c].bias for c in classes])
        weight = weight.expand(decoded.shape[0], -1, -1)
        return torch.baddbmm(bias[:, None].to(decoded.dtype), decoded, weight.transpose(1, 2).to(decoded.dtype))

    @torch.no_grad()
    def transport_maps(self, restored: Restored, classes: Sequence[int] | None) -> dict[int, Tensor]:
        """The transport score of every quantised level, (B, *grid) float32 each, between 0 and 2.

        For each token the expected cosine distance to a code, under the softmax of its products with the codes
        (released code: no optimal transport is solved).
        """
        chosen = self.select(restored.pair.target, classes)
        scores = {}
        for level, quantized in restored.levels.items():
            codes = self.codebooks[str(level)].of(chosen, quantized.source.shape[0])
            divisor = self.transport_divisor or codes.shape[2]
            scores[level] = transport_cost(quantized.source, codes, divisor).unflatten(1, self.grid)
        return scores

    def distance_map(self, restored: Restored, classes: Sequence[int] | None) -> Tensor:
        """Residual's L2 norm plus the weighted transport score, (B, *grid) float32, before any resize."""
        target, reconstruction = (x.float() for x in restored.pair)
        residual = torch.linalg.vector_norm(reconstruction - target, dim=1)
        scores = self.transport_maps(restored, classes) if self.transport != "off" else {}
        return residual + self.transport_weight * self.chosen_transport(scores, self.transport)

    @staticmethod
    def chosen_transport(scores: dict[int, Tensor], transport: Transport) -> Tensor | float:
        """The score of the lowest quantised level, or the sum over all of them; 0.0 without any or for `off`."""
        if not scores or transport == "off":
            return 0.0
        return scores[min(scores)] if transport == "lowest" else torch.stack(list(scores.values())).sum(0)

    # ---- codebooks ---------------------------------------------------------------------------------------------------

    @property
    def codebooks_started(self) -> bool:
        """Whether any codebook counts tokens: the released start has counted none."""
        return any(bool(book.counts.any()) for level in self.codebooks.values() for book in level.books)

    @torch.no_grad()
    def start_codebooks(self, features: list[Tensor], classes: Sequence[int], generator: torch.Generator) -> None:
        """Codes become tokens of these images, each counted once (our start `data`; the released one is random).

        features, classes: as in `forward`, of some images of every class. generator: of the choice of tokens, on the
        CPU. The network's parameters are not changed. Raises ValueError for a class without an image.
        """
        was_training = self.training
        self.eval()
        encoded = self.encode(self.prepare(features)[0].flatten(2).transpose(1, 2))
        top, highest = len(encoded) - 1, None
        for name, level in self.codebooks.items():
            x = encoded[top] if int(name) == top else torch.cat([encoded[int(name)], highest], dim=-1)
            own = list(classes) if len(level.books) > 1 else [0] * len(x)
            level.start(x, own, generator)
            if int(name) == top:
                highest = level(x, own).tokens
        self.train(was_training)

    def codes_in_use(self, reset: bool = True) -> dict[int, float]:
        """Share of codes that were chosen in training since the last reset, by level: the mean over its codebooks."""
        shares = {}
        for name, level in self.codebooks.items():
            shares[int(name)] = float(torch.stack([book.used.float().mean() for book in level.books]).mean())
            if reset:
                for book in level.books:
                    book.used.zero_()
        return shares


class Codebook(nn.Module):
    """The codes of one level and class, with the moving averages that they follow. All are buffers.

    codes: (width, K), one code per column; counts: (K,) moving average of the tokens assigned to each; sums: (width, K)
    moving average of their sums. The start is the released one: normal codes, sums equal to them, nothing counted.
    used: (K,) bool, chosen in training since someone last looked.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    used: Tensor

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        start = torch.randn(width, codes)
        self.register_buffer("codes", start)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", start.clone())
        self.register_buffer("used", torch.zeros(codes, dtype=torch.bool), persistent=False)

    def follow(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """One step of the moving averages: counts (K,) and sums (width, K) of an image's tokens."""
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + len(counts) * EPSILON) * total
        self.codes.copy_(self.sums / smoothed)
        self.used |= counts > 0


class Codebooks(nn.Module):
    """One level's codebooks, one per class; in training mode they follow what they quantise.

    The released code takes one image after the other, and each sees the codes that the one before left. Images of
    different classes do not meet, so here the first image of every class is taken at once, then the second of every
    class, and so on: the same numbers. The released code mixes up the classes of several processes. Here every process
    gets the images of all of them, in the order of a single process' batch, and makes the same updates.

    Args:
        width: of the tokens; codes: per codebook; classes: how many codebooks; decay: of the moving averages.
    """

    def __init__(self, width: int, codes: int, classes: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.books = nn.ModuleList(Codebook(width, codes) for _ in range(classes))

    def forward(self, x: Tensor, classes: Sequence[int] | Tensor) -> Quantized:
        """x: (B, L, width); classes: the codebook of each image. Computed in float32, also under autocast."""
        if len(self.books) == 1:
            classes = [0] * len(x) if self.training else [0]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            own = x.detach()
            if self.training:
                nearest, indices = self._follow(own, classes)
            else:
                nearest, indices = nearest_codes(own, self.of(classes, x.shape[0]))
            commitment = F.mse_loss(x, nearest)
            return Quantized(x + (nearest - own), indices, commitment, own)

    def of(self, classes: Sequence[int] | Tensor, images: int) -> Tensor:
        """The codes that each of so many images meets, (images, width, K); one class is for all."""
        if len(self.books) == 1:
            return self.books[0].codes.expand(images, -1, -1)
        return torch.stack([book.codes for book in self.books])[classes].expand(images, -1, -1)

    @torch.no_grad()
    def _follow(self, x: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `nearest_codes`, while the codebooks learn; only this process' images are returned."""
        x, classes, own = _of_all_processes(x, classes)
        nearest = torch.empty_like(x)
        indices = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
        for positions in rounds(classes):
            books = [self.books[classes[p]] for p in positions]
            tokens = x[positions]
            nearest[positions], chosen = nearest_codes(tokens, torch.stack([book.codes for book in books]))
            indices[positions] = chosen
            assigned = F.one_hot(chosen, books[0].codes.shape[1]).to(x.dtype)  # (n, L, K)
            counts, sums = assigned.sum(1), tokens.transpose(1, 2) @ assigned
            for book, count, total in zip(books, counts, sums, strict=True):
                book.follow(count, total, self.decay)
        return nearest[own], indices[own]

    def start(self, x: Tensor, classes: Sequence[int], generator: torch.Generator) -> None:
        """Codes of each class become tokens of its images x (B, L, width), drawn without repetition where there are enough."""
        for number, book in enumerate(self.books):
            images = [position for position, c in enumerate(classes) if c == number]
            if not images:
                raise ValueError(f"No image of class {number} to start its codebook from.")
            tokens = x[images].flatten(0, 1).float()
            wanted = book.codes.shape[1]
            order = torch.cat(
                [torch.randperm(len(tokens), generator=generator) for _ in range(math.ceil(wanted / len(tokens)))]
            )
            book.codes.copy_(tokens[order[:wanted].to(tokens.device)].T)
            book.sums.copy_(book.codes)
            book.counts.fill_(1.0)


def nearest_codes(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of every token: (B, L, D) with codes (B, D, K) -> codes (B, L, D) and indices int64 (B, L)."""
    distances = x.square().sum(-1, keepdim=True) - 2 * (x @ codes) + codes.square().sum(1, keepdim=True)
    indices = distances.argmin(-1)
    return codes.transpose(1, 2).gather(1, indices[..., None].expand(-1, -1, codes.shape[1])), indices


def transport_cost(x: Tensor, codes: Tensor, divisor: float) -> Tensor:
    """Expected cosine distance of tokens (B, L, D) to codes (B, D, K) under softmax(<x, code> / divisor): (B, L).

    A zero vector is at distance 1 from everything. The softmax is stable, also where the released one overflows.
    """
    products = x @ codes
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    cosine = torch.where(lengths > 0, products / lengths.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    return ((products / divisor).softmax(-1) * (1 - cosine)).sum(-1)


def rounds(classes: Sequence[int]) -> list[list[int]]:
    """Positions in a batch: the first image of every class, then the second of every class, and so on."""
    seen: Counter[int] = Counter()
    found: list[list[int]] = []
    for position, c in enumerate(classes):
        if seen[c] == len(found):
            found.append([])
        found[seen[c]].append(position)
        seen[c] += 1
    return found


def _of_all_processes(x: Tensor, classes: Sequence[int]) -> tuple[Tensor, list[int], slice]:
    """Images (B, ...) and classes of all processes, in the order in which they are dealt to them, and where one's own are.

    Every process holds as many images as the others; image j of process r is number j * processes + r.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x, list(classes), slice(None)
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if processes == 1:
        return x, list(classes), slice(None)
    labels = torch.tensor(list(classes), device=x.device)
    all_x = [torch.empty_like(x) for _ in range(processes)]
    all_labels = [torch.empty_like(labels) for _ in range(processes)]
    torch.distributed.all_gather(all_x, x.contiguous())
    torch.distributed.all_gather(all_labels, labels)
    dealt = torch.stack(all_x, dim=1).flatten(0, 1)
    return dealt, torch.stack(all_labels, dim=1).flatten().tolist(), slice(rank, None, processes)


RELEASED_BACKBONE = "enc."
"""Of the backbone's tensors in the authors' checkpoints; its running statistics are not ImageNet's."""
# The authors' names, first match wins; `input_proj` of theirs is never called and has no place here.
_RELEASED = (
    (r"pos_embed\.", "position."),
    (r"quantize_conv_t\.", "input_projection."),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"encoder.\1.attention."),
    (r"encoder\.layers\.(\d+)\.(linear\d)\.", r"encoder.\1.feedforward.\2."),
    (r"encoder\.layers\.(\d+)\.(norm\d)\.", r"encoder.\1.\2."),
    (r"decoder\.layers\.(\d+)\.self_attn\.", r"decoder.\1.attention1."),
    (r"decoder\.layers\.(\d+)\.multihead_attn\.", r"decoder.\1.attention2."),
    (r"decoder\.layers\.(\d+)\.(linear\d)\.", r"decoder.\1.feedforward.\2."),
    (r"decoder\.layers\.(\d+)\.(norm\d)\.", r"decoder.\1.\2."),
    (r"decoder\.norm\.", "norm."),
    (r"output_proj_list\.", "heads."),
)
_RELEASED_BUFFERS = {"embed": "codes", "cluster_size": "counts", "embed_avg": "sums"}


def released_name(name: str) -> str | None:
    """The name here of a tensor of the authors' checkpoint; None if it has none. Their level numbers count from 1."""
    if found := re.fullmatch(r"quantize_list_(\d+)\.(\d+)\.(\w+)", name):
        level, number, buffer = int(found[1]) - 1, found[2], _RELEASED_BUFFERS.get(found[3])
        return buffer and f"codebooks.{level}.books.{number}.{buffer}"
    return renamed(name, _RELEASED)
