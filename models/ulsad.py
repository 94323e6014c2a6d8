"""ULSAD: unified local and global feature reconstruction for structural and logical anomalies.

Paper: "Unsupervised Anomaly Detection by learning the unified local and global structures" (ULSAD), Patra and Ben
Taieb, TMLR 2025, https://arxiv.org/abs/2410.16255. Where the released code and the paper's text or tables disagree,
the released code is the default; `ULSADDetails` switches to what the paper prints.

    two backbone levels -> the finer grid, c* channels -> standardised per channel                 = U
    U     -> local network psi  -> local reconstruction U', imitation U'' of the autoencoder
    image -> global autoencoder phi                                                                = U^
    local map = D(U, U')        global map = D(U^, U'')        D = mean squared difference + lambda (1 - cosine)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head import distance_map
from models.layers.neck import resize_concatenate
from models.layers.statistics import BranchQuantiles, ChannelStatistics
from models.reconstruction import Pair, ReconstructionNetwork

LOSS_TERMS = ("pl", "pg", "pg_d", "lg")
GLOBAL_MAPS = ("auto", "bridge", "direct", "attention", "none")


@dataclass(frozen=True)
class ULSADDetails:
    """Where the released code and the printed paper differ, and one choice of ours. The defaults are the released code's.

    Args:
        encoder_activation: "relu" (code, and the paper's Table 4) or "leaky_relu" with slope 0.01 (the paper's text).
        third_activation: activation after the third encoder convolution (Table 4: True; code: False).
        decoder_sizes: "released" (at image size 256: 3, 8, 15, 31, 63) or "printed", the nominal powers of two of Table 5
            (4, 8, 16, 32, 64; its first entry, 31, contradicts the map size that follows it and is read as 4).
        autoencoder_output: "linear" (code) or "relu" (Table 5).
        autoencoder_affine: learnable scale and shift in the autoencoder's batch normalisation, with PyTorch's default eps
            1e-5 (Table 5 says plain BatchNorm); False is the code: none, eps 1e-4.
        local_output: "relu" (code) or, which is ours, "linear": a ReLU cannot give the negative half of standardised
            features, which is small for a ResNet's, but a half for levels that do not end in a ReLU (EfficientNet).
    """

    encoder_activation: str = "relu"
    third_activation: bool = False
    decoder_sizes: str = "released"
    autoencoder_output: str = "linear"
    autoencoder_affine: bool = False
    local_output: str = "relu"

    def __post_init__(self) -> None:
        _one_of("encoder_activation", self.encoder_activation, ("relu", "leaky_relu"))
        _one_of("decoder_sizes", self.decoder_sizes, ("released", "printed"))
        _one_of("autoencoder_output", self.autoencoder_output, ("linear", "relu"))
        _one_of("local_output", self.local_output, ("relu", "linear"))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


class FeatureAggregator(nn.Module):
    """Two adjacent backbone levels to one map of c* channels.

    The coarser level is resized bilinearly (align_corners False) to the finer, both are concatenated (finer first) and
    the channel vector of every position is average-pooled adaptively to `channels`: for WideResNet50-2, 512 + 1024
    channels to 384, output j is the mean of channels 4j .. 4j+3 (released code; the paper does not mention it).

    Args:
        channels: channels of the two levels.
        pooled: c*; None keeps the concatenation, as the paper's text has it.
    """

    def __init__(self, channels: Sequence[int], pooled: int | None = 384) -> None:
        super().__init__()
        if len(channels) != 2:
            raise ValueError(
                f"ULSAD aggregates two adjacent backbone levels, got {len(channels)} with channels {list(channels)}. "
                "Set backbone.levels to two neighbours, e.g. [3, 4] for wide_resnet50_2 (strides 8 and 16)."
            )
        self.concatenated = sum(channels)
        self.channels = self.concatenated if pooled is None else pooled
        if not 0 < self.channels <= self.concatenated:
            raise ValueError(
                f"pooled_channels is {pooled}, but the two levels have {channels[0]} + {channels[1]} = "
                f"{self.concatenated} channels together, and average pooling cannot make more. "
                f"Choose 1 to {self.concatenated}, or null to keep them all."
            )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(B, C1, H, W), (B, C2, h, w)] float, finer first -> (B, c*, H, W)."""
        x = resize_concatenate(features, features[0].shape[-2:], align_corners=False)
        if self.channels == self.concatenated:
            return x
        if self.concatenated % self.channels == 0:
            return x.unflatten(1, (self.channels, -1)).mean(dim=2)
        B, C, H, W = x.shape
        x = F.adaptive_avg_pool1d(x.permute(0, 2, 3, 1).reshape(B, H * W, C), self.channels)
        return x.reshape(B, H, W, self.channels).permute(0, 3, 1, 2).contiguous()


class FeatureReconstructionNetwork(nn.Module):
    """psi, the local network (paper section 3.2, Table 4): a convolutional encoder and decoder, spatial bottleneck 4x.

    With `double_head` the last layer has 2 c* outputs: the reconstruction of U and the imitation of the global
    autoencoder. Every output is >= 0 (batch norm + ReLU at the end), although the targets are standardised: this is
    the released code; `details.local_output` can leave the ReLU out. At c* = 384 it has 65,487,744 parameters (double head).
    """

    def __init__(self, channels: int, double_head: bool = True, details: ULSADDetails | None = None) -> None:
        super().__init__()
        details = details or ULSADDetails()
        c, heads = channels, 2 if double_head else 1

        def activation() -> nn.Module:
            return nn.LeakyReLU(0.01, inplace=True) if details.encoder_activation == "leaky_relu" else nn.ReLU(True)

        self.double_head = double_head
        self.encoder = nn.Sequential(
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.BatchNorm2d(2 * c), activation(),
            nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1), nn.BatchNorm2d(4 * c), activation(),
            nn.Conv2d(4 * c, 4 * c, 3, padding=1), nn.BatchNorm2d(4 * c),
            activation() if details.third_activation else nn.Identity(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4 * c, 2 * c, 4, stride=2, padding=1), nn.BatchNorm2d(2 * c), nn.ReLU(True),
            nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1), nn.BatchNorm2d(c), nn.ReLU(True),
            nn.ConvTranspose2d(c, heads * c, 5, padding=2), nn.BatchNorm2d(heads * c),
            nn.Identity() if details.local_output == "linear" else nn.ReLU(True),
        )  # fmt: skip
        # The released initialisation: the gain of a leaky ReLU with slope 0.01, biases as PyTorch sets them.
        gain = nn.init.calculate_gain("leaky_relu", 0.01)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight, gain=gain)

    def forward(self, u: Tensor) -> Tensor:
        """Standardised features (B, c*, h, w), h and w divisible by 4 -> (B, c* or 2 c*, h, w), >= 0 with a ReLU output."""
        return self.decoder(self.encoder(u))


class GlobalAutoencoder(nn.Module):
    """phi, the global autoencoder (paper section 3.3, Table 5): image -> 64 numbers -> c* channels on the feature grid.

    `image_size` is any (height, width) divisible by 64. The bottleneck convolution has kernel 8, as in the paper (at
    256 it leaves one position, at 512 nine by nine); an image side below 256 leaves fewer than 8 positions there, and
    the kernel shrinks to them (an extension: the paper has 256 only). 1,030,720 parameters at c* = 384.
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        feature_size: tuple[int, int],
        details: ULSADDetails | None = None,
    ) -> None:
        super().__init__()
        details = details or ULSADDetails()
        for side, name in zip(image_size, ("height", "width"), strict=True):
            if side < 64 or side % 64:
                raise ValueError(
                    f"the global autoencoder needs an image {name} divisible by 64, got {side}; "
                    f"nearest: {max(64, round(side / 64) * 64)}"
                )
        self.image_size = tuple(image_size)

        def norm(width: int) -> nn.Module:
            if details.autoencoder_affine:
                return nn.BatchNorm2d(width)
            return nn.BatchNorm2d(width, eps=1e-4, affine=False)

        def block(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int, padding: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, stride, padding), norm(outputs), nn.ReLU(inplace=True)
            )

        bottleneck = (min(8, image_size[0] // 32), min(8, image_size[1] // 32))
        self.encoder = nn.Sequential(
            block(3, 32, 4, 2, 1),
            block(32, 32, 4, 2, 1),
            block(32, 64, 4, 2, 1),
            block(64, 64, 4, 2, 1),
            block(64, 64, 4, 2, 1),
            block(64, 64, bottleneck, 1, 0),
        )
        # Interpolation sizes before each decoder convolution; a k4 p2 convolution adds one to each side.
        less = 1 if details.decoder_sizes == "released" else 0
        self.decoder_sizes = [
            tuple(max(1, side // divisor - minus) for side in image_size)
            for divisor, minus in ((64, less), (32, 0), (16, less), (8, less), (4, less))
        ] + [tuple(feature_size)]
        self.decoder = nn.ModuleList([block(64, 64, 4, 1, 2) for _ in range(5)] + [block(64, 64, 3, 1, 1)])
        self.output = nn.Conv2d(64, channels, 3, padding=1)
        self.output_activation = nn.ReLU() if details.autoencoder_output == "relu" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> U^ (B, c*, h, w), of either sign (linear output)."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"the global autoencoder was built for images of {self.image_size[0]}x{self.image_size[1]}, "
                f"got {images.shape[-2]}x{images.shape[-1]}"
            )
        x = self.encoder[:-1](images)
        if self.training and len(images) == 1 and self.encoder[-1][0].kernel_size == tuple(x.shape[-2:]):
            raise ValueError(
                "a training batch of one image: batch normalisation of the 1x1 bottleneck has nothing to average. "
                "Use a batch size of at least 2 and drop the last incomplete batch"
            )
        x = self.encoder[-1](x)
        for size, block in zip(self.decoder_sizes, self.decoder, strict=True):
            x = block(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        return self.output_activation(self.output(x))


def feature_attention(keys: Tensor, queries: Tensor) -> Tensor:
    """Attention maps of Eq. 3 and 4: every query position becomes a softmax-weighted mean of the key positions.

    keys (also the values), queries: (B, C, h, w). Scores are z_p . x_q / sqrt(C), the softmax runs over the keys p for
    each query q; no projections, one head. Returns (B, C, h, w). The fused kernel never stores the (hw, hw) matrix.
    """
    B, C, H, W = keys.shape
    k = keys.flatten(2).transpose(1, 2).unsqueeze(1)
    q = queries.flatten(2).transpose(1, 2).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, k, scale=1.0 / math.sqrt(C))
    return out.squeeze(1).transpose(1, 2).reshape(B, C, H, W)


def ulsad_distance(pair: Pair, direction: float) -> Tensor:
    """D at every position (Eq. 1, 7): mean squared difference of the channels plus `direction` x (1 - cosine).

    Pair of (B, C, h, w) -> (B, h, w) float32. lambda = 0 leaves the cosine out altogether.
    """
    return distance_map(pair, "mse_cosine", direction) if direction else distance_map(pair, "squared_mean")


class ULSADFeatures(NamedTuple):
    """What one pass gives; every entry (B, c*, h, w) or None where the chosen terms do not need it.

    target: U, standardised. local: U', reconstruction of U. imitation: U'', the local network's imitation of the
    autoencoder. autoencoded: U^, the autoencoder's output.
    """

    target: Tensor
    local: Tensor | None
    imitation: Tensor | None
    autoencoded: Tensor | None


class ULSADNetwork(ReconstructionNetwork):
    """The whole method behind the frozen backbone.

    Args:
        channels: of the two backbone levels, finer first.
        image_size: (height, width), divisible by 64.
        sizes: See `channels`.
        pooled_channels: c*.
        terms: the losses, each on or off: `pl`, local reconstruction, D(U, U') (Eq. 1); `pg`, global, self-attention against
            cross-attention, D(A, A^) (Eq. 5); `pg_d`, global, direct, D(U, U^) instead of the attention maps (ablation;
            not in released code); `lg`, bridge: the local network's second head imitates the autoencoder, D(U^, U'')
            (Eq. 6).
        lambda_l: weight of the direction (cosine) term in local and in global distances, in losses and maps; lambda_g None
            = as lambda_l, which all published runs have.
        lambda_g: See `lambda_l`.
        global_map: what the global anomaly map compares. "bridge": U^ and U'' (the method); "direct": U and U^;
            "attention": A and A^ (the last two are the options for models trained without lg, whose second head is
            untrained; paper and code leave this open). "auto": bridge with lg, else attention with pg, direct with pg_d,
            none without a global term. "none": local map only.
        double_head: None = doubled exactly when `lg` needs it.
        details: where the released code and the paper differ; None = the released code.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
        pooled_channels: int | None = 384,
        terms: Sequence[str] = ("pl", "pg", "lg"),
        lambda_l: float = 0.5,
        lambda_g: float | None = None,
        global_map: str = "auto",
        double_head: bool | None = None,
        details: ULSADDetails | None = None,
    ) -> None:
        super().__init__()
        self.terms = _check_terms(terms)
        self.lambda_l = float(lambda_l)
        self.lambda_g = self.lambda_l if lambda_g is None else float(lambda_g)
        for name, value in (("lambda_l", self.lambda_l), ("lambda_g", self.lambda_g)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it weights the direction term and must be >= 0")
        self.global_map = resolve_global_map(global_map, self.terms)
        double = "lg" in self.terms if double_head is None else double_head
        if "lg" in self.terms and not double:
            raise ValueError("the loss term lg trains the local network's second head: it needs double_head true")
        size = (*sizes[0],)
        if any(side % 4 for side in size):
            raise ValueError(
                f"the local network halves its {size[0]}x{size[1]} input twice and needs sides divisible by 4; "
                "change image_size or backbone.levels"
            )
        self.aggregator = FeatureAggregator(channels, pooled_channels)
        self.statistics = ChannelStatistics(self.aggregator.channels)
        self.quantiles = BranchQuantiles()
        self.local_network = None
        if {"pl", "lg"} & set(self.terms):
            self.local_network = FeatureReconstructionNetwork(self.aggregator.channels, double, details)
        self.global_network = None
        if {"pg", "pg_d", "lg"} & set(self.terms):
            self.global_network = GlobalAutoencoder(self.aggregator.channels, image_size, size, details)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the anomaly maps that this model has, in the order of `forward`: "local", "global"."""
        return ("local",) * ("pl" in self.terms) + ("global",) * (self.global_map != "none")

    @property
    def directions(self) -> tuple[float, ...]:
        """lambda of each branch's map."""
        return tuple({"local": self.lambda_l, "global": self.lambda_g}[branch] for branch in self.branches)

    @property
    def preparation(self) -> str:
        channels = self.aggregator.channels
        return f"two levels at the finer grid without aligned corners, concatenated, channels pooled to {channels}"

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        """Two levels to one map of pooled channels, not yet standardised: the statistics come with the training."""
        return [self.aggregator(levels)]

    def encode(self, pooled: Tensor, images: Tensor, groups: Sequence[str] | None = None) -> ULSADFeatures:
        """Pooled raw features (B, c*, h, w), normalised images (B, 3, H, W), dataset names -> everything compared."""
        with torch.no_grad():
            target = self.statistics(pooled, groups)
        local = imitation = autoencoded = None
        if self.local_network is not None:
            local = self.local_network(target)
            if self.local_network.double_head:
                local, imitation = local.chunk(2, dim=1)
        if self.global_network is not None:
            autoencoded = self.global_network(images)
        return ULSADFeatures(target, local, imitation, autoencoded)

    def attention_pair(self, features: ULSADFeatures) -> Pair:
        """(A, A^): self-attention of U (constant) and cross-attention with the autoencoder's output as query."""
        # float32 under autocast too: a score on itself is about sqrt(c*), beyond which half precision rounds.
        with torch.autocast(features.target.device.type, enabled=False):
            target = features.target.float()
            with torch.no_grad():
                self_attention = feature_attention(target, target)
            return Pair(self_attention, feature_attention(target, features.autoencoded.float()))

    def losses(self, features: ULSADFeatures) -> dict[str, Tensor]:
        """Each chosen term, unweighted scalars (all weights are 1: their sum is the training loss)."""
        losses = {}
        if "pl" in self.terms:
            losses["pl"] = ulsad_distance(Pair(features.target, features.local), self.lambda_l).mean()
        if "pg" in self.terms:
            losses["pg"] = ulsad_distance(self.attention_pair(features), self.lambda_g).mean()
        if "pg_d" in self.terms:
            losses["pg_d"] = ulsad_distance(Pair(features.target, features.autoencoded), self.lambda_g).mean()
        if "lg" in self.terms:
            losses["lg"] = ulsad_distance(Pair(features.autoencoded, features.imitation), self.lambda_g).mean()
        return losses

    def pairs(self, features: ULSADFeatures) -> list[Pair]:
        """What the anomaly maps compare, one pair per entry of `branches`."""
        pairs = [Pair(features.target, features.local)] if "pl" in self.terms else []
        if self.global_map == "bridge":
            pairs.append(Pair(features.autoencoded, features.imitation))
        elif self.global_map == "direct":
            pairs.append(Pair(features.target, features.autoencoded))
        elif self.global_map == "attention":
            pairs.append(self.attention_pair(features))
        return pairs

    def branch_maps(self, pairs: Sequence[Pair]) -> Tensor:
        """Pairs of `forward` -> (B, branches, h, w) float32 distance maps on the feature grid."""
        return torch.stack([ulsad_distance(p, d) for p, d in zip(pairs, self.directions, strict=True)], dim=1)

    def forward(self, features: Sequence[Tensor], images: Tensor, groups: Sequence[str] | None = None) -> list[Pair]:
        """Prepared features [(B, c*, h, w)], images (B, 3, H, W), dataset names -> pairs, one per branch."""
        return self.pairs(self.encode(features[0], images, groups))


def _check_terms(terms: Sequence[str]) -> tuple[str, ...]:
    unknown = [t for t in terms if t not in LOSS_TERMS]
    if unknown:
        raise ValueError(f"unknown loss term {', '.join(map(repr, unknown))}; allowed are {', '.join(LOSS_TERMS)}")
    if not terms:
        raise ValueError("no loss term is on: nothing would be trained")
    chosen = tuple(t for t in LOSS_TERMS if t in terms)
    if chosen == ("lg",):
        raise ValueError(
            "lg alone ties the two networks only to each other: both could output a constant. Add pl, pg or pg_d"
        )
    return chosen


def resolve_global_map(global_map: str, terms: Sequence[str]) -> str:
    """The global map that `global_map` means for these loss terms; raises where it would show an untrained network."""
    _one_of("global_map", global_map, GLOBAL_MAPS)
    trained = {"pg", "pg_d", "lg"} & set(terms)
    if global_map == "auto":
        if "lg" in terms:
            return "bridge"
        if {"pg", "pg_d"} <= set(terms):
            raise ValueError(
                "with both pg and pg_d and without lg, the global map can be 'attention' or 'direct': set global_map"
            )
        return "attention" if "pg" in terms else "direct" if "pg_d" in terms else "none"
    if global_map == "bridge" and "lg" not in terms:
        raise ValueError(
            "global_map 'bridge' compares the autoencoder with the local network's second head, which only the loss "
            "term lg trains. Use 'attention' or 'direct', or add lg"
        )
    if global_map in ("direct", "attention") and not trained:
        raise ValueError(f"global_map {global_map!r} needs a trained autoencoder: add pg, pg_d or lg to the loss terms")
    if global_map == "none" and "pl" not in terms:
        raise ValueError("global_map 'none' without the local term pl leaves no anomaly map")
    return global_map


# Modules of the released code -> modules here. The released networks are called featae (psi) and img_encoder (phi).
_RELEASED_MODULES = {
    **{f"featae.conv{i + 1}": f"local_network.encoder.{3 * i}" for i in range(3)},
    **{f"featae.bn{i + 1}": f"local_network.encoder.{3 * i + 1}" for i in range(3)},
    **{f"featae.deconv{i + 1}": f"local_network.decoder.{3 * i}" for i in range(3)},
    **{f"featae.bn{i + 4}": f"local_network.decoder.{3 * i + 1}" for i in range(3)},
    **{f"img_encoder.enconv{i + 1}": f"global_network.encoder.{i}.0" for i in range(6)},
    **{f"img_encoder.bn2d{i + 1}": f"global_network.encoder.{i}.1" for i in range(6)},
    **{f"img_encoder.deconv{i + 1}": f"global_network.decoder.{i}.0" for i in range(5)},
    **{f"img_encoder.bn2d{i + 7}": f"global_network.decoder.{i}.1" for i in range(6)},
    "img_encoder.deconv7": "global_network.decoder.5.0",
    "img_encoder.deconv8": "global_network.output",
}


def released_name(name: str) -> str | None:
    """The released code's parameter name in this file's terms."""
    module, _, leaf = name.rpartition(".")
    return f"{_RELEASED_MODULES[module]}.{leaf}" if module in _RELEASED_MODULES else None


def import_released_extras(network: ULSADNetwork, state: Mapping[str, Tensor], group: str = "released") -> list[str]:
    """Channel statistics and quantiles from a released state dict (without prefix); returns the names it used.

    Quantiles that are all 0 are "not set": so they are in every released checkpoint but the last epoch's.
    Raises ValueError when the statistics are missing.
    """
    missing = [name for name in ("mean_std.mean", "mean_std.std") if name not in state]
    if missing:
        raise ValueError(f"the released checkpoint lacks {' and '.join(missing)}, the channels' statistics")
    network.statistics.set(group, state["mean_std.mean"], state["mean_std.std"])
    used = ["mean_std.mean", "mean_std.std"]
    names = {branch: {0.9: f"quantiles.qa_{branch}", 0.995: f"quantiles.qb_{branch}"} for branch in network.branches}
    if all(name in state for branch in names.values() for name in branch.values()):
        values = {branch: {p: float(state[name]) for p, name in entry.items()} for branch, entry in names.items()}
        used += [name for entry in names.values() for name in entry.values()]
        if any(value for entry in values.values() for value in entry.values()):
            network.quantiles.set({group: values})
    return used
