"""HVQ-Trans: Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly Detection, Lu et al.,
NeurIPS 2023, arXiv:2310.14228."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from datamodules.errors import DataError
from datamodules.sample_table import category_keys
from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from lightning_modules.metrics.sync import Group
from lightning_modules.running.schedules import Drops
from models import hvq_trans
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.layers.classifier import PooledClassifier
from models.moving_backbone import moving_statistics, set_moving
from models.reconstruction import Pair
from results.aggregator.names import DATASET_CATEGORIES
from results.aggregator.records import LABELS_AT_TEST


class HVQTrans(ReconstructionModule):
    """HVQ-Trans with the released recipe as defaults: 1000 epochs of AdamW, 1e-4, a tenth from epoch index 801.

    The released schedule is stepped with the epoch's index after the epoch, so its drop at 800 acts from 801. The log
    of the authors comes from two processes of 16 images. The network is built when the training data have told their
    categories. Each process computes the codebooks' updates for the images of all of them.

    Args:
        backbone: EfficientNet-B4, levels 1 to 4, with the released code's padding.
        head: Resize with aligned corners; image score = maximum of the 16x16-averaged map. The distance is the network's
            own: the residual's L2 norm plus the transport score.
        optimizer: AdamW with weight decay 1e-4 on every trainable tensor.
        lr_scheduler: A tenth from epoch index 801.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels; each side a multiple of the highest level's stride.
        grid: Token grid (height, width); None = the size of the highest level.
        commitment: Weight of the commitment terms, which are summed over the levels.
        codebook_start: `released`: normal codes that have counted nothing. The first update divides their sums by tiny
            counts, and for over a thousand updates of a class one code serves all its tokens. `data`: tokens of the
            untrained network on some training images of each class.
        backbone_mode: `eval`: frozen features, cached. `train`: as released, batch norms use and follow the training
            batches and stochastic depth is on during training, so that features cannot be cached.
        predicted_class: The category of images without one (`predict`), where the selector needs it.
        score_transport: More weights of the transport score; each is scored at the lowest level and over all levels,
            as variants `transport=lowest,weight=W` and `transport=all,weight=W`, next to `transport=off`.
        d_model: See `models.hvq_trans.HVQTrans`.
        heads: See `d_model`.
        feedforward: See `d_model`.
        encoder_layers: See `d_model`.
        decoder_layers: See `d_model`.
        dropout: See `d_model`.
        codes: See `d_model`.
        decay: See `d_model`.
        hierarchy: See `d_model`.
        selector: See `d_model`.
        switched: See `d_model`.
        transport: See `d_model`.
        transport_weight: See `d_model`.
        transport_divisor: See `d_model`.
    """

    method = "hvq_trans"
    recipe = Recipe(
        resize="pil_bilinear",
        batch_size=16,
        max_epochs=1000,
        gradient_clip_val=0.1,
        best_on_test=("image_auroc", 10),
    )
    network: hvq_trans.HVQTrans

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b4.aa_in1k", (1, 2, 3, 4), padding="released"),
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: Drops(optimizer, first=801),
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 224,
        grid: tuple[int, int] | None = None,
        commitment: float = 0.25,
        codebook_start: Literal["released", "data"] = "released",
        backbone_mode: Literal["eval", "train"] = "eval",
        predicted_class: str | None = None,
        score_transport: Sequence[float] = (),
        d_model: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        dropout: float = 0.1,
        codes: int = 512,
        decay: float = 0.99,
        hierarchy: int | None = None,
        selector: hvq_trans.Selector = "label",
        switched: Sequence[hvq_trans.Switched] = ("codebooks", "heads"),
        transport: hvq_trans.Transport = "lowest",
        transport_weight: float = 80.0,
        transport_divisor: float | None = None,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if commitment < 0:
            raise ValueError(f"commitment is {commitment}; a negative weight would push tokens off their codes.")
        for option, value, allowed in (
            ("codebook_start", codebook_start, ("released", "data")),
            ("backbone_mode", backbone_mode, ("eval", "train")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} is {value!r}; choose {' or '.join(allowed)}.")
        rows, columns = grid or self.extractor.sizes(self.image_size)[-1]
        self.grid = (rows, columns)
        self.commitment, self.codebook_start, self.predicted_class = commitment, codebook_start, predicted_class
        self.score_transport = tuple(score_transport)
        self.backbone_mode = backbone_mode
        if backbone_mode == "train":
            set_moving(self.extractor.net, backbone.name)
            self.uncached = "backbone_mode=train lets the backbone's statistics move"
        if selector == "classifier":
            self.untiled = "selector=classifier tells the category of a whole image, not of a tile"
        elif codebook_start == "data":
            self.untiled = "codebook_start=data reads whole training images"
        self.options: dict[str, Any] = {
            "d_model": d_model,
            "heads": heads,
            "feedforward": feedforward,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "dropout": dropout,
            "codes": codes,
            "decay": decay,
            "hierarchy": hierarchy,
            "selector": selector,
            "switched": switched,
            "transport": transport,
            "transport_weight": transport_weight,
            "transport_divisor": transport_divisor,
        }
        self.network = self._new_network(1)  # until the classes are known; wrong options are refused at once
        self.class_names: list[str] = []
        self._guesses = [0, 0]

    # ---- classes -----------------------------------------------------------------------------------------------------

    def _new_network(self, classes: int) -> hvq_trans.HVQTrans:
        return hvq_trans.HVQTrans([sum(self.extractor.channels)], [self.grid], classes, **self.options)

    def build(self, class_names: Sequence[str], seed: int = 0) -> None:
        """Makes the network for these categories; its start depends on the seed alone."""
        self.class_names = list(class_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = self._new_network(len(self.class_names))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and not self.class_names:
            self.build(self.trainer.datamodule.categories, self.trainer.datamodule.seed)

    def classes(self, batch: Mapping[str, Any]) -> list[int] | None:
        """Number of each image's category; None where the selector does not ask for it."""
        options = self.network
        if options.selector == "none" or (options.selector == "classifier" and not options.training):
            return None
        names = batch.get("category") or [""]  # one stands for all
        if len(self.class_names) == 1:
            return [0] * len(names)
        names = [name or self.predicted_class or "" for name in names]
        unknown = sorted(set(names) - set(self.class_names))
        if unknown:
            listed = ", ".join(self.class_names)
            what = f"images of {', '.join(unknown)}" if unknown != [""] else "images whose category is not known"
            raise DataError(
                f"HVQ-Trans with selector=label takes codebooks and head by the image's category, and was not trained on "
                f"{what}; it knows {listed}. Name one with --model.init_args.predicted_class (make export: CATEGORY=, load_run: "
                "category=), or train with selector=classifier or none."
            )
        return [self.class_names.index(name) for name in names]

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> HVQTrans:
        """As always, but a backbone that moves takes part in it."""
        super().train(mode)
        if self.backbone_mode == "train":
            self.extractor.net.train(mode)
        return self

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        return [self._restore(batch).pair]

    def _restore(self, batch: Mapping[str, Any]) -> hvq_trans.Restored:
        if not self.class_names:
            raise ValueError("HVQ-Trans learns its classes in training: give a checkpoint (--ckpt_path).")
        return self.network(self.features(batch), self.classes(batch))

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error plus the weighted commitment."""
        restored = self._restore(batch)
        error = F.mse_loss(restored.pair.reconstruction.float(), restored.pair.target.float())
        if self.training:
            self.keep({"loss_features": error.detach(), "loss_commitment": restored.commitment.detach()}, batch)
            if self._processes() > 1:  # every process must reach every head for the gradients to be shared
                error = error + 0.0 * sum(p.sum() for p in self.network.heads.parameters())
        return error + self.commitment * restored.commitment

    def _processes(self) -> int:
        return self.attached.world_size if self.attached is not None else 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A head without an image in any process stays as it is, as with one process."""
        if self._processes() == 1:
            return
        parameters = [p for p in self.network.heads.parameters() if p.grad is not None]
        for parameter, used in zip(parameters, torch.stack([p.grad.any() for p in parameters]).tolist(), strict=True):
            if not used:
                parameter.grad = None

    def compiled_parts(self) -> list[torch.nn.Module]:
        return [*self.network.encoder, *self.network.decoder]

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.is_last_batch and self.network.codebooks:
            shares = list(self.network.codes_in_use().values())
            self.log("train/codes_in_use", sum(shares) / len(shares), on_step=False, on_epoch=True, batch_size=1)

    # ---- what is estimated from data ---------------------------------------------------------------------------------

    @torch.no_grad()
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.backbone_mode == "train":
            self.train()  # the extractor is made in eval mode, and Lightning leaves the modes of a network's parts alone
        if self.codebook_start == "data" and self.network.codebooks and not self.network.codebooks_started:
            self._start_codebooks()
        if self.network.classifier is not None and not self.network.classifier.fitted:
            self._fit_classifier()

    def on_train_end(self) -> None:
        if self.network.classifier is not None and self.backbone_mode == "train":
            self._fit_classifier()  # for the features as they are now

    def _start_codebooks(self) -> None:
        """From evenly picked training images: twice as many tokens of each class as there are codes, or all."""
        data = self.trainer.datamodule
        per_class = max(1, math.ceil(2 * self.options["codes"] / (self.grid[0] * self.grid[1])))
        table = data.table
        ids, names = [], []
        for name in self.class_names:
            own = [
                number
                for number, key, split in zip(table.id.tolist(), category_keys(table), table.split, strict=True)
                if key == name and split == "train"
            ]
            count = min(per_class, len(own))
            ids += [own[k * len(own) // count] for k in range(count)]
            names += [name] * count
        was_training = self.training
        self.eval()
        features = [
            self.extract(data.image_batch(ids[first : first + 32])["image"].to(self.device))[0]
            for first in range(0, len(ids), 32)
        ]
        numbers = [self.class_names.index(name) for name in names]
        levels = [torch.cat(features)]
        levels = levels if self.standardisation is None else self.standardisation(levels)
        self.network.start_codebooks(levels, numbers, torch.Generator().manual_seed(data.seed))
        self.train(was_training)

    @torch.no_grad()
    def _fit_classifier(self) -> None:
        """On the pooled features of all training images, the same on every process."""
        was_training = self.training
        self.eval()
        own: list[Any] = []
        for batch in self.trainer.datamodule.train_images():
            batch = self.trainer.strategy.batch_to_device(batch)
            pooled = PooledClassifier.pool(self.features(batch)[0]).cpu()
            own += zip(batch["id"].tolist(), batch["category"], pooled, strict=True)
        rows = sorted((row for part in Group().gather_objects(own) for row in part), key=lambda row: row[0])
        classes = torch.tensor([self.class_names.index(name) for _, name, _ in rows])
        pooled = torch.stack([values for _, _, values in rows]).to(self.device)
        self.network.classifier.fit(pooled, classes.to(self.device))
        self.train(was_training)

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        restored = self._restore(batch)
        network, classes = self.network, self.classes(batch)
        residual = self.head.level_maps([restored.pair])[0]
        asked = network.transport != "off" or self.score_transport
        transport = network.transport_maps(restored, classes) if asked and restored.levels else {}

        def scored(kind: hvq_trans.Transport, weight: float) -> ScoredMaps:
            level_map = residual + weight * network.chosen_transport(transport, kind)
            return self.head.score([level_map], self.image_size)

        found = {"": scored(network.transport, network.transport_weight)}
        if self.score_transport and transport:
            found["transport=off"] = scored("off", 0.0)
            for kind in ("lowest", "all"):
                found |= {f"transport={kind},weight={w:g}": scored(kind, w) for w in self.score_transport}
        return found

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, ScoredMaps]:
        if self.network.classifier is not None:
            guessed = self.network.classifier(self.network.prepare(self.features(batch))[0]).tolist()
            pairs = zip(guessed, batch["category"], strict=True)
            self._guesses[0] += sum(self.class_names[number] == name for number, name in pairs)
            self._guesses[1] += len(guessed)
        return super().test_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self._guesses = [0, 0]

    def on_test_epoch_end(self) -> None:
        self._guesses = [sum(part) for part in zip(*Group().gather_objects(self._guesses), strict=True)]

    def record_notes(self) -> list[str]:
        options, notes = self.options, []
        switched = " and ".join(options["switched"])
        if options["selector"] == "label" and switched and len(self.class_names) > 1:
            notes.append(f"{LABELS_AT_TEST}: {switched} of HVQ-Trans are chosen by the true category of a test image")
        if options["selector"] == "classifier":
            right, images = self._guesses
            notes.append(f"{switched} are chosen by a classifier, right on {right} of {images} test images")
        notes.append(f"codebooks start: {self.codebook_start}; backbone mode: {self.backbone_mode}")
        return notes

    def prepare_import(self, state: Mapping[str, Tensor], categories: Sequence[str]) -> None:
        """The authors number their classes by the alphabet; the data must have all of them, or their full list be known."""
        count = len({name.split(".")[-2] for name in state if "output_proj_list." in name and name.endswith(".weight")})
        lists = [
            sorted(categories),
            *(sorted(names) for names in DATASET_CATEGORIES.values() if set(categories) <= set(names)),
        ]
        fitting = [names for names in lists if len(names) == count]
        if not fitting:
            raise DataError(
                f"The checkpoint has {count} classes, the data {len(categories)} ({', '.join(categories)}), and a class is "
                "known by its place in the alphabet only: give all categories that the authors trained on."
            )
        self.build(fitting[0])

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = self.class_names
        if self.backbone_mode == "train":
            checkpoint["backbone_statistics"] = moving_statistics(self.extractor.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.class_names not in ([], checkpoint["class_names"]):
            raise ValueError(
                f"The checkpoint's classes are {', '.join(checkpoint['class_names'])}, the data's "
                f"{', '.join(self.class_names)}: an image of another class has no codebooks there."
            )
        if not self.class_names:
            self.build(checkpoint["class_names"])
        super().on_load_checkpoint(checkpoint)
        if statistics := checkpoint.get("backbone_statistics"):
            checkpoint["state_dict"] |= {f"extractor.net.{name}": value for name, value in statistics.items()}
