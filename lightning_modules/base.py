"""What every method shares: frozen features in, pairs of target and reconstruction, anomaly maps out.

A method is a subclass that names its paper's recipe and builds its network; see `lightning_modules/uniad.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from datamodules.dataset import TrainingViews
from lightning_modules.metrics.sync import Group
from lightning_modules.running import internals
from lightning_modules.stitching import stitched
from models.backbones import BackboneConfig, FeatureExtractor
from models.head import AnomalyHead, HeadConfig, ScoredMaps
from models.layers.statistics import Standardisation
from models.reconstruction import FeatureNetwork, Pair
from models.trunk import NoBackbone

ImageSize = int | tuple[int, int]
"""Side of a square image, or (height, width), in pixels."""
Interval = Literal["epoch", "step"]
"""After what a learning-rate schedule goes on."""


@dataclass(frozen=True)
class Recipe:
    """What a paper fixes outside its network; a configuration that leaves these open gets these values.

    Args:
        resize: Resize rule of the data module (`pil_bilinear`, `pil_lanczos`, `pil_nearest`, `opencv_bilinear`).
        batch_size: Images per training step and process.
        max_epochs: Training epochs.
        max_steps: Optimiser steps after which the training ends earlier; -1 for never. It counts where the configuration
            gives no number of epochs.
        gradient_clip_val: Largest total L2 norm of the gradient; None for no clipping.
        best_on_test: The metric and the interval in epochs by which the released code picks its checkpoint on the test
            set. Only the protocol `as_released` does so.
        best_on_test_tie: Which of equally good epochs it keeps, `last` or `first`.
        drop_last: Whether the last incomplete training batch is left out.
        released_subset: The part of the test set that the released code evaluates, a `test_subset` of the data module.
            Only the protocol `as_released` does so.
        repeat: How often an epoch goes over the training images.
    """

    resize: str
    batch_size: int
    max_epochs: int
    gradient_clip_val: float | None = None
    best_on_test: tuple[str, int] | None = None
    best_on_test_tie: str = "last"
    drop_last: bool = False
    max_steps: int = -1
    released_subset: str = "full"
    repeat: int = 1


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class ReconstructionModule(L.LightningModule):
    """Base of all methods: a frozen backbone, a network that reconstructs its features, a head that scores the residual.

    Subclasses set `method` and `recipe`, assign `self.network` in the constructor and override `loss` when
    the paper's loss is not the mean squared error.

    Args:
        backbone: The frozen feature extractor; or what stands in its place where a method trains all that it uses.
        head: Distance, fusion, smoothing and image score.
        make_optimizer: Gives an optimiser of the trainable parameters. Learning rates are not scaled with the number of
            processes. None for a method that is not trained by gradients: its `training_step` returns None.
        image_size: Size of the input images in pixels.
        schedule: Gives the optimiser's schedule; None for a constant learning rate.
        interval: Whether the schedule goes on after every `epoch` or every `step`.

    Raises:
        ValueError: a package of `needs_packages` is not installed; or the optimiser or the schedule refuses its own options.
    """

    method: ClassVar[str]
    recipe: ClassVar[Recipe]
    needs_images: ClassVar[bool] = False
    """Whether the network reads the images besides their features."""
    has_backbone: ClassVar[bool] = True
    """Whether features of a frozen backbone are used; else the method trains its own trunk on images."""
    has_map: bool = True
    """Whether maps mean something; else pixels are not measured and none are pictured."""
    standardises: ClassVar[bool] = False
    """Whether the method standardises its features by itself, so that `backbone.standardised` is refused."""
    reconstructs: ClassVar[bool] = True
    """Whether `reconstruct` has an answer; methods that only measure distances have none to picture."""
    needs_packages: ClassVar[Mapping[str, str]] = {}
    """Python packages beyond requirements.txt without which the method does not run: name for import, and the command that
    installs it. A sweep leaves the method's cells out where one is not installed."""
    needs_files: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that must be the path of something that exists; else a sweep leaves the method's cells out."""
    uncached: str = ""
    """Why features cannot be cached, as half a sentence; empty where they can."""
    unexported: str = ""
    """Why no graph of tensors can compute the scores, as half a sentence; empty where one can."""
    untiled: str = ""
    """Why photographs cannot be cut into tiles, as half a sentence; empty where they can."""
    map_names: tuple[str, ...] = ()
    """Names of the level maps in pictures, in the order of `ScoredMaps.level_maps`; empty: they are numbered."""
    network: FeatureNetwork

    def __init__(
        self,
        backbone: BackboneConfig,
        head: HeadConfig,
        make_optimizer: OptimizerCallable | None,
        image_size: ImageSize,
        schedule: LRSchedulerCallable | None = None,
        interval: Interval = "epoch",
    ) -> None:
        # A method that trains its trunk hands over a NoBackbone; were it in the annotation, the parser would take a part
        # of a backbone's options for neither of the two.
        # Subclasses call these three optimizer, lr_scheduler and lr_interval. Under one name, the command line would hand the
        # base class's None on to a subclass, whose own optimiser and schedule would be lost; of the optimiser
        # jsonargparse 4.46 does.
        super().__init__()
        if reason := self.absent_package():  # before weights are looked for
            raise ValueError(reason)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (height, width)
        self.extractor = backbone if isinstance(backbone, NoBackbone) else FeatureExtractor(backbone)
        self.extractor.sizes(self.image_size)  # a size that the backbone does not take is refused here
        standardised = self.has_backbone and backbone.standardised
        if standardised and self.standardises:
            raise ValueError(f"backbone.standardised: {self.method} standardises its features already. Leave it out.")
        self.standardisation = Standardisation() if standardised else None
        self.head = AnomalyHead(head)
        self.optimizer, self.schedule, self.interval = make_optimizer, schedule, interval
        if make_optimizer is not None:  # impossible options are refused now, not after minutes of preparation
            self._scheduled(make_optimizer([nn.Parameter(torch.zeros(1))]))
        self.trained_epochs = 0
        self.origin = ""
        self._unchecked_loss: tuple[Tensor, torch.cuda.Event | None, Mapping[str, Any], int] | None = None
        self._losses: dict[str, list[tuple[Tensor, int]]] = {}

    @classmethod
    def absent_package(cls) -> str | None:
        """Which package of `needs_packages` is not installed, and what installs it, as a sentence; None if all are."""
        for package, install in cls.needs_packages.items():
            if importlib.util.find_spec(package) is None:
                return f"{cls.method} needs the Python package {package}, which is not installed: {install}."
        return None

    # ---- what a method may change ------------------------------------------------------------------------------------

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        """Pairs of (target, reconstruction), one per level the method reconstructs, lowest level first."""
        return self.network(self.features(batch))

    def loss(self, pairs: list[Pair]) -> Tensor:
        """Training loss, a float32 scalar: mean squared error, summed over the pairs."""
        return torch.stack([F.mse_loss(pair.reconstruction.float(), pair.target.float()) for pair in pairs]).sum()

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """Anomaly maps (B, H, W) and image scores (B,) by name; "" is the method itself.

        Other names are other readings of the same forward pass, each scored and recorded as a variant of the run.
        """
        return {"": self.head(self.reconstruct(batch), self.image_size)}

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Loss of one batch, a float32 scalar."""
        return self.loss(self.reconstruct(batch))

    def compiled_parts(self) -> list[nn.Module]:
        """The modules whose forward passes are a step's work, for `run.compile`."""
        return [self.network]

    def set_protocol(self, protocol: str, selection: str) -> None:
        """Told by the command line before anything runs: `clean` or `as_released`, and `last` or `best_on_test`.

        Raises ValueError when the method's arguments contradict it.
        """

    def avoid_solves(self) -> None:
        """Called before a graph is made for a runtime that cannot solve linear systems."""

    def record_notes(self) -> list[str]:
        """What a reader of the run's numbers must know besides the configuration."""
        return []

    def training_views(self) -> TrainingViews | None:
        """What training batches carry instead of plain images; None: the images themselves."""
        return None

    def prepare_import(self, state: Mapping[str, Tensor], categories: Sequence[str]) -> None:
        """Called before an authors' checkpoint is imported, for what its tensors and the data's categories decide."""

    def before_scoring(self, last_epoch: bool) -> None:
        """Called in eval mode before the test set is scored during training, for what must be estimated first."""

    # ---- what no method changes --------------------------------------------------------------------------------------

    def score_batch(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        """As `evaluate`; of a photograph in tiles the stitched maps (see `lightning_modules.stitching`)."""
        return stitched(self.evaluate, batch) if "tiles" in batch else self.evaluate(batch)

    @property
    def attached(self) -> L.Trainer | None:
        """The trainer; None for a module that is used without one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def setup(self, stage: str) -> None:
        """Pixels are normalised as the backbone's weights expect, unless the data module was told otherwise."""
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "normalise"):
            data.normalise(self.extractor.mean, self.extractor.std)
        views = self.training_views()
        if views is not None and hasattr(data, "view_training_images"):
            data.view_training_images(views)

    def features(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The prepared levels, each (B, C_l, H_l, W_l) float32: from the batch if it carries them, else computed."""
        levels = batch["features"] if "features" in batch else self.extract(batch["image"])
        return levels if self.standardisation is None else self.standardisation(levels)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        if self.standardisation is None or self.standardisation.is_fitted:
            return  # resumed: the statistics came with the checkpoint
        device = self.trainer.strategy.batch_to_device
        batches = map(device, self.trainer.datamodule.train_images())
        raw = (batch["features"] if "features" in batch else self.extract(batch["image"]) for batch in batches)
        self.standardisation.merge(Group().gather_objects(self.standardisation.measured(raw)))

    @torch.no_grad()
    def extract(self, images: Tensor) -> list[Tensor]:
        """What the network gets of normalised images (B, 3, H, W), in full precision also under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network.prepare(self.extractor(images))

    def forward(self, images: Tensor) -> ScoredMaps:
        """Anomaly maps and image scores of normalised images (B, 3, H, W)."""
        return self.evaluate({"image": images})[""]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        self._check_loss()
        loss = self.batch_loss(batch)
        self.watch(loss.detach(), batch)
        return loss

    def watch(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Keeps a step's loss for the curve, and stops the training at the next step if it is not finite."""
        self.keep({"loss": loss}, batch)
        # This copy waits for the loss alone. Asking the device for it later would wait for the whole step.
        on_host = loss.to("cpu", non_blocking=True)
        ready = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
        self._unchecked_loss = (on_host, ready, batch, self.global_step)

    def keep(self, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Keeps scalars of a step; their means over the epoch's images are logged as `train/<name>`."""
        for name, loss in losses.items():
            self._losses.setdefault(name, []).append((loss, len(batch["label"])))

    def on_train_epoch_start(self) -> None:
        self._losses.clear()

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
        if not self.trainer.is_last_batch and not 0 < self.trainer.max_steps <= self.trainer.global_step:
            return
        self._check_loss()  # before anything looks at the epoch's weights
        # Once per epoch: a log in every step takes as long as the launch of a small network. Over all processes: one's
        # own share of the images would give another curve than a single process's.
        for name, steps in self._losses.items():
            losses, sizes = zip(*steps, strict=True)
            weights = torch.tensor(sizes, device=losses[0].device) / sum(sizes)
            mean = (torch.stack(losses) * weights).sum()
            options = {"on_step": False, "on_epoch": True, "sync_dist": True, "prog_bar": name == "loss"}
            self.log(f"train/{name}", mean, batch_size=sum(sizes), **options)

    def on_train_epoch_end(self) -> None:
        self.trained_epochs = self.current_epoch + 1

    def _check_loss(self) -> None:
        """Looks at the previous step's loss, which is ready by now."""
        if self._unchecked_loss is None:
            return
        (loss, ready, batch, step), self._unchecked_loss = self._unchecked_loss, None
        if ready is not None:
            ready.synchronize()
        if math.isfinite(loss.item()):
            return
        files = "\n  ".join(f"{c}: {p}" for c, p in zip(batch["category"], batch["path"], strict=True))
        raise NonFiniteLossError(
            f"The training loss is {loss.item()} at step {step} (epoch {self.current_epoch}). The batch held\n  {files}\n"
            "Look for damaged images or non-finite features among them, or lower the learning rate "
            "(--model.init_args.optimizer.lr)."
        )

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.batch_loss(batch), batch_size=len(batch["label"]), sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, ScoredMaps]:
        return self.score_batch(batch)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> ScoredMaps:
        return self.score_batch(batch)[""]

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The method's optimiser over some parameters."""
        optimizer = self.optimizer(parameters)
        if self.attached is not None and "mixed" in str(self.attached.precision):
            internals.allow_clipping(optimizer)
        return optimizer

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            return None
        return self._scheduled(self.optimizer_of(p for p in self.parameters() if p.requires_grad))

    def _scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimiser with its schedule, as Lightning wants them."""
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer)
        if self.attached is not None and getattr(schedule, "total_steps", 0) is None:
            schedule.total_steps = self.trainer.estimated_stepping_batches
        if not self.automatic_optimization:  # the method steps it itself
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}
        monitor = getattr(schedule, "monitor", None)  # of Lightning's ReduceLROnPlateau
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.interval, "monitor": monitor},
        }

    # ---- checkpoints: without the frozen backbone, bound to it by its hash --------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("extractor.")]:
            del checkpoint["state_dict"][name]
        checkpoint["backbone"] = self.extractor.provenance
        checkpoint["trained_epochs"] = self.trained_epochs
        checkpoint["origin"] = self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained_on, now = checkpoint["backbone"], self.extractor.provenance
        if trained_on["sha256"] != now["sha256"]:
            raise ValueError(
                f"The checkpoint was trained on the features of {trained_on['name']} with weights {trained_on['weights']} "
                f"(sha256 {trained_on['sha256'][:12]}), but the backbone at hand is {now['name']} with weights "
                f"{now['weights']} (sha256 {now['sha256'][:12]}). Give the same backbone and weights."
            )
        self.trained_epochs = checkpoint["trained_epochs"]
        self.origin = checkpoint.get("origin", "")
        own = self.extractor.state_dict(prefix="extractor.")
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}
