"""RLR: Learning Unified Reference Representation for Unsupervised Multi-class Anomaly Detection, He et al., ECCV 2024,
arXiv:2403.11561."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn, stack
from torch.optim import Adam

from lightning_modules.base import ImageSize, Interval, Recipe, ReconstructionModule
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.reconstruction import Pair
from models.rlr import LevelNetwork, RLRNetwork, level_loss, released_width


class RLR(ReconstructionModule):
    """RLR with the setting of the released README command as defaults: 200 epochs, Adam 1e-4, batch 4, jitter scale 4.

    The argparse defaults of the released code (3 layers, no jitter, batch 16) are not the published setting. The README
    command looks at the test set after every epoch and keeps the best one (protocol `as_released`).

    Args:
        backbone: EfficientNet-B6, levels 3 and 4 (strides 8 and 16).
        head: Per token MSE + (1 - cosine), mean over the levels resized with aligned corners; pixel metrics read this
            map, the image score is the maximum after smoothing with sigma 4.
        optimizer: Adam.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels.
        widths: Token width of each level; None for the released rule, 32 times the level's stride.
        update: How a batch moves the levels, which share no parameter. `joint`: one optimiser, one step on the summed
            loss. `per_level`: an optimiser and a step per level, the same numbers. `released`: one optimiser for
            all, stepped once per level with the other levels' gradients at zero, as torch 1.12 (which the released code
            pins) did; every parameter then moves once more per batch, by its momentum.
        diversity_weight: Weight of the diversity term of the references (1 in the released code where it is switched
            on); without effect for a single reference.
        diversity_normaliser: `released`, half of the mean cosine over pairs, or `pairs`, the mean.
        network: Arguments of `models.rlr.RLRNetwork`.
    """

    method = "rlr"
    recipe = Recipe(resize="pil_lanczos", batch_size=4, max_epochs=200, best_on_test=("image_auroc", 1))

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("tf_efficientnet_b6.aa_in1k", (3, 4)),
        head: HeadConfig = HeadConfig(
            distance="mse_cosine",
            fusion="mean",
            smoothing_sigma=4.0,
            smoothing_border="symmetric",
            smoothing_target="image_score",
            image_score="max",
        ),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        widths: Sequence[int] | None = None,
        update: Literal["joint", "per_level", "released"] = "joint",
        diversity_weight: float = 0.0,
        diversity_normaliser: Literal["released", "pairs"] = "released",
        **network,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        if update not in ("joint", "per_level", "released"):
            raise ValueError(f"update is {update!r}; choose joint, per_level or released.")
        if update != "joint" and lr_scheduler is not None:
            raise ValueError(f"lr_scheduler needs update=joint; update is {update}.")
        if diversity_weight < 0:
            raise ValueError(f"diversity_weight is {diversity_weight}; a negative one would make references alike.")
        widths = widths or [released_width(stride) for stride in self.extractor.strides]
        self.network = RLRNetwork(
            self.extractor.channels, self.extractor.sizes(self.image_size), widths=widths, **network
        )
        self.update = update
        self.automatic_optimization = update == "joint"
        self.diversity_weight, self.diversity_normaliser = diversity_weight, diversity_normaliser

    def level_loss(self, network: LevelNetwork, pair: Pair) -> Tensor:
        """Loss of one level, a float32 scalar: MSE + mean (1 - cosine) + weighted diversity of its references."""
        loss = level_loss(pair)
        if self.diversity_weight:
            loss = loss + self.diversity_weight * network.diversity(self.diversity_normaliser)
        return loss

    def loss(self, pairs: list[Pair]) -> Tensor:
        losses = [self.level_loss(network, pair) for network, pair in zip(self.network.levels, pairs, strict=True)]
        return stack(losses).sum()

    # ---- updates level by level --------------------------------------------------------------------------------------

    def compiled_parts(self) -> list[nn.Module]:
        return super().compiled_parts() if self.update == "joint" else list(self.network.levels)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.update != "joint" and self.trainer.world_size > 1:
            raise ValueError(
                f"update={self.update} steps between two backward passes, before {self.trainer.world_size} processes "
                "have shared their gradients. Use update=joint (per_level gives the same numbers) or one process."
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        if self.update == "joint":
            return super().training_step(batch, batch_idx)
        self._check_loss()
        levels, optimizers = self.network.levels, self.optimizers()
        if not isinstance(optimizers, list):
            optimizers = [optimizers] * len(levels)
        total = 0.0
        # One level's forward pass follows the previous level's step, which under `released` moves all levels.
        for level, feature, optimizer in zip(levels, self.features(batch), optimizers, strict=True):
            loss = self.level_loss(level, self.network.reconstruct(level, feature))
            # Zeros instead of None let Adam's momentum move the levels that this loss does not reach.
            optimizer.zero_grad(set_to_none=self.update == "per_level")
            self.manual_backward(loss)
            optimizer.step()
            total = total + loss.detach()
        self.watch(total, batch)
        return None

    def configure_optimizers(self) -> Any:
        if self.update != "per_level":
            return super().configure_optimizers()
        return [self.optimizer_of(level.parameters()) for level in self.network.levels]
