"""ULSAD: local and global feature reconstruction for structural and logical anomalies, Patra and Ben Taieb, TMLR 2025,
arXiv:2410.16255."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam

from datamodules.errors import DataError
from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from lightning_modules.metrics.sync import Group
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.layers.quantiles import StreamingQuantiles
from models.reconstruction import Pair
from models.ulsad import ULSADNetwork

SOURCES = ("protocol", "held_out", "train", "test_good", "none")
CHUNK = 32  # maps brought to image size at a time


@dataclass(frozen=True)
class QuantileConfig:
    """The scale on which local and global maps are added: 0.1 (map - q_alpha) / (q_beta - q_alpha).

    Quantiles are exact, over all pixels of all maps of normal images of a dataset (smoothed, at image size).

    Args:
        source: Which normal images. `held_out`: the data module's validation split (LOCO's own validation folder,
            else set `data.init_args.holdout`). `train`: the training images themselves. `test_good`: the good
            test images, what the released code does (protocol `as_released` only). `none`: maps are added as they
            are. `protocol`: held_out if clean, test_good if as_released.
        alpha: Probability of the lower quantile, which becomes 0.
        beta: Probability of the upper one, which becomes 0.1.
        alphas: More values; every pair of them is scored from the same trained model, as a variant of the run named
            `alpha=A,beta=B`, next to `quantiles=none`.
        betas: See `alphas`.
    """

    source: str = "protocol"
    alpha: float = 0.9
    beta: float = 0.995
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"quantiles.source is {self.source!r}; allowed are {', '.join(SOURCES)}.")
        if bool(self.alphas) != bool(self.betas):
            raise ValueError("quantiles.alphas and quantiles.betas span a grid: give both or neither.")
        if self.alphas and self.source == "none":
            raise ValueError("quantiles.alphas and betas need quantiles: quantiles.source is none.")
        for alpha, beta in self.pairs:
            if not 0 <= alpha < beta <= 1:
                raise ValueError(f"quantiles: alpha={alpha}, beta={beta} must satisfy 0 <= alpha < beta <= 1.")

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The pair that counts, then the grid."""
        return [(self.alpha, self.beta), *product(self.alphas, self.betas)]

    @property
    def probabilities(self) -> list[float]:
        """All quantiles to estimate."""
        return sorted({p for pair in self.pairs for p in pair})


class ULSAD(ReconstructionModule):
    """ULSAD with the released configuration as defaults: 200 epochs, Adam 2e-4 with L2 decay 2e-5, batch 8.

    The paper trains one model per category (`data.init_args.setting=per_category`). One model for all categories
    (`unified`) is this repository's own experiment; channel statistics and quantiles are then kept per dataset.

    The protocol `as_released` does what the released code does: the epoch with the best image AUROC on the test set
    counts (the first of equals), the test set loses its last incomplete batch of 32, and quantiles come from good test
    images and belong to the last epoch's weights only, so that they act only if the last epoch is the best one.

    Args:
        backbone: WideResNet50-2, levels 3 and 4 (strides 8 and 16).
        head: Mean of the two maps, resized without aligned corners, smoothed with sigma 4; image score = maximum. Its
            cosine_weight follows lambda_l and lambda_g.
        optimizer: Adam.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels, a multiple of 64.
        quantiles: The common scale of the two maps.
        score_branches: Also score the local and the global map alone, as variants `map=local` and `map=global`.
        network: Arguments of `models.ulsad.ULSADNetwork`.
    """

    method = "ulsad"
    standardises = True
    recipe = Recipe(
        resize="opencv_bilinear",
        batch_size=8,
        max_epochs=200,
        best_on_test=("image_auroc", 1),
        best_on_test_tie="first",
        drop_last=True,
        released_subset="drop_last_32",
    )
    needs_images = True
    network: ULSADNetwork

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("wide_resnet50_2.racm_in1k", (3, 4)),
        head: HeadConfig = HeadConfig(
            distance="mse_cosine",
            fusion="mean",
            align_corners=False,
            smoothing_sigma=4.0,
            smoothing_kernel=33,
            image_score="max",
        ),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=2e-4, weight_decay=2e-5, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        quantiles: QuantileConfig = QuantileConfig(),
        score_branches: bool = False,
        **network,
    ) -> None:
        if head.distance != "mse_cosine":
            raise ValueError(
                f'ULSAD compares by mean square + lambda (1 - cosine), head.distance "mse_cosine", found '
                f'"{head.distance}". Set lambda_l and lambda_g to 0 to leave the cosine out.'
            )
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.quantiles = quantiles
        self.score_branches = score_branches
        self.network = ULSADNetwork(
            self.extractor.channels, self.extractor.sizes(self.image_size), self.image_size, **network
        )
        if head.cosine_weight not in (HeadConfig.cosine_weight, self.network.lambda_l):
            raise ValueError(
                f"head.cosine_weight is {head.cosine_weight}, but ULSAD has one weight per branch: set lambda_l and "
                "lambda_g instead."
            )
        self.map_names = tuple(f"{branch} map" for branch in self.network.branches)
        if score_branches and len(self.map_names) == 1:
            raise ValueError("score_branches: this model has one branch only, which is scored anyway.")
        if self.network.global_network is not None:
            self.untiled = "its global autoencoder judges how the whole image is arranged, which no tile shows"
        self._estimates = "held_out"
        self._selection = "last"

    # ---- features and loss -------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        return self.network.pairs(self._encode(batch))

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        losses = self.network.losses(self._encode(batch))
        if self.training:
            self.keep({f"loss_{term}": loss.detach() for term, loss in losses.items()}, batch)
        return torch.stack(list(losses.values())).sum()

    def compiled_parts(self) -> list[nn.Module]:
        return [part for part in (self.network.local_network, self.network.global_network) if part is not None]

    def _encode(self, batch: Mapping[str, Any]):
        return self.network.encode(self.features(batch)[0], batch["image"], batch.get("dataset"))

    # ---- maps --------------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        maps = list(self.network.branch_maps(self.reconstruct(batch)).unbind(1))
        groups = batch.get("dataset")
        scaled = bool(self.network.quantiles.groups) and self._estimates != "none"

        def score(pair: tuple[float, float] | None, selection: list[int] | None = None) -> ScoredMaps:
            affine = None
            if pair is not None:
                scale, shift = self.network.quantiles.affine(self.network.branches, groups, *pair)
                affine = scale.to(maps[0]), shift.to(maps[0])  # (branches, B or 1, 1, 1): one scale per image
            return self.head.score(maps, self.image_size, level_affine=affine, selection=selection)

        pair, *grid = self.quantiles.pairs
        scored = {"": score(pair if scaled else None)}
        if scaled and grid:
            scored |= {f"alpha={alpha:g},beta={beta:g}": score((alpha, beta)) for alpha, beta in grid}
            scored["quantiles=none"] = score(None)
        if self.score_branches and len(maps) > 1:
            scored |= {f"map={name}": score(None, [n]) for n, name in enumerate(self.network.branches)}
        return scored

    # ---- what is estimated from data ---------------------------------------------------------------------------------

    def set_protocol(self, protocol: str, selection: str) -> None:
        source = self.quantiles.source
        if source == "test_good" and protocol == "clean":
            raise ValueError(
                "quantiles.source=test_good looks at the test set: it needs run.protocol=as_released. Use held_out or "
                "train."
            )
        if source == "protocol":
            source = "held_out" if protocol == "clean" else "test_good"
        self._estimates, self._selection = source, selection

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule
        if self._estimates == "held_out" and not len(data.val_dataloader() or ()):
            raise DataError(
                "No normal image is held out for the quantiles: the validation split is empty. Set "
                "data.init_args.holdout (e.g. 0.1), or quantiles.source to train (the training images) or none."
            )
        if self.network.statistics.groups:
            return  # resumed: they came with the checkpoint
        with torch.no_grad():
            for batch in self._batches(data.train_images()):
                self.network.statistics.update(self.features(batch)[0], batch["dataset"])
        own = self.network.statistics.moments()
        self.network.statistics.reset()
        for moments in Group().gather_objects(own):
            self.network.statistics.merge(moments)
        self.network.statistics.finish()

    def before_scoring(self, last_epoch: bool) -> None:
        if last_epoch and self._estimates == "test_good" and self._selection == "best_on_test":
            self._estimate_quantiles()

    def on_train_end(self) -> None:
        # Under best_on_test the last epoch's weights have theirs already, and any other epoch's must have none.
        if self._estimates != "none" and not (self._estimates == "test_good" and self._selection == "best_on_test"):
            self._estimate_quantiles()

    def on_predict_start(self) -> None:
        known = self.network.statistics.groups
        if len(known) > 1 and self.trainer.datamodule.predicted_dataset not in known:
            raise DataError(
                f"This model keeps its channel statistics per dataset ({', '.join(known)}), and the images to predict lie in "
                f"the folder of none: say which they are like, with --data.init_args.predict_dataset={known[0]} for example."
            )

    def on_test_start(self) -> None:
        missing = sorted(set(self.quantiles.probabilities) - self._known_probabilities())
        if missing and self._estimates in ("held_out", "train"):
            self._estimate_quantiles()  # the checkpoint comes without the quantiles that are asked for now

    def _known_probabilities(self) -> set[float]:
        groups = self.network.quantiles.get().values()
        return {p for branches in groups for values in branches.values() for p in values}

    def _normal_images(self) -> Iterable[Any]:
        data = self.trainer.datamodule
        if self._estimates == "train":
            return data.train_images()
        loader = data.val_dataloader() if self._estimates == "held_out" else data.test_dataloader()
        if not len(loader):
            raise DataError(
                "No normal image is held out for the quantiles: set data.init_args.holdout, or quantiles.source to "
                "train."
            )
        return loader

    @torch.no_grad()
    def _estimate_quantiles(self) -> None:
        """Exact quantiles of each branch's maps of normal images, per dataset; only feature-sized maps are kept."""
        was_training = self.training
        self.eval()
        kept: dict[str, dict[int, Tensor]] = {}
        for batch in self._batches(self._normal_images()):
            maps = self.network.branch_maps(self.reconstruct(batch)).cpu()
            for number, group in enumerate(batch["dataset"]):
                if batch["label"][number] == 0:
                    kept.setdefault(group, {})[int(batch["id"][number])] = maps[number]
        groups = self._each_once(kept)
        branches = self.network.branches
        values = {}
        for group in groups:
            chunks = torch.stack(list(kept[group].values())).split(CHUNK) if kept.get(group) else ()
            values[group] = {branch: self._quantiles(chunks, number) for number, branch in enumerate(branches)}
        self.network.quantiles.set(values)
        self.train(was_training)

    @staticmethod
    def _each_once(kept: dict[str, dict[int, Tensor]]) -> list[str]:
        """Drops what a process of lower rank keeps, too (one without images repeats another's); all groups, sorted."""
        everywhere = Group().gather_objects({group: list(maps) for group, maps in kept.items()})
        for before in everywhere[: Group().rank]:
            for group, ids in before.items():
                for image in ids:
                    kept.get(group, {}).pop(image, None)
        return sorted({group for part in everywhere for group in part})

    def _quantiles(self, chunks: Iterable[Tensor], branch: int) -> dict[float, float]:
        quantiles = StreamingQuantiles(self.quantiles.probabilities)
        for number in (1, 2):
            for chunk in chunks:
                levels = list(chunk.to(self.device).unbind(1))
                quantiles.update(self.head.score(levels, self.image_size, selection=[branch]).maps)
            quantiles.counts = torch.stack(Group().gather_objects(quantiles.counts)).sum(0)
            if number == 1:
                quantiles.next_pass()
        return dict(zip(quantiles.probabilities, quantiles.result(), strict=True))

    def _batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        for batch in loader:
            yield self.trainer.strategy.batch_to_device(batch)

    def record_notes(self) -> list[str]:
        groups = self.network.quantiles.groups
        scale = f"quantiles {self._estimates} of {', '.join(groups)}" if groups else "maps added without quantiles"
        statistics = self.network.statistics.groups
        return [f"channel statistics per dataset: {', '.join(statistics)}", scale]
