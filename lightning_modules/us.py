"""US: Uninformed Students, Student-Teacher Anomaly Detection with Discriminative Latent Embeddings, Bergmann et al., CVPR
2020, arXiv:1911.02357."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam

from datamodules.errors import DataError
from datamodules.images import IMAGE_SUFFIXES, read_image, resize_image
from datamodules.patches import RandomPatches
from lightning_modules.base import ImageSize, Interval, NonFiniteLossError, Recipe, ReconstructionModule
from lightning_modules.callbacks.progress import work_progress
from lightning_modules.metrics.sync import Group
from models import us
from models.backbones import BackboneConfig
from models.head import HeadConfig, ScoredMaps
from models.layers.tracing import in_parts
from models.reconstruction import Pair
from models.weight_files import check_finite, check_fit, file_sha256, read_state_dict

POOL = 5000
"""Images that a teacher is trained on are held in memory, at most so many of them, evenly picked."""
BATCH = 64
"""Images that are read at a time."""
CHUNK = 4
"""Images that are scored at a time: their descriptors take 100 MB each at 256 pixels, for every student."""


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teachers come from: distilled from the backbone when training starts, or a file.

    Args:
        file: Finished teachers: a checkpoint of this method with the same patch sizes and widths, or a file with the
            tensors `<patch size>.conv1.weight` and so on.
        images: Folder of images to cut the patches from (the paper: ImageNet), at most 5000 of them, evenly picked. None is
            the run's own training images, and the record says so: such a teacher knows nothing of other images.
        steps: Steps of each teacher (50,000 in the paper).
        batch_size: Patches per step.
        lr: Of Adam; the decay is an L2 term.
        weight_decay: See `lr`.
        distillation: Weights of the three losses. The paper's for MVTec AD are 1, 0 and 1.
        triplet: See `distillation`.
        compactness_weight: See `distillation`.
        compactness: Correlations between descriptors' `dims` or between `samples`; see
            `models.us.compactness_loss`. The paper leaves it open.
        delta: Margin of the triplet loss.
    """

    file: str | None = None
    images: str | None = None
    steps: int = 50_000
    batch_size: int = 64
    lr: float = 2e-4
    weight_decay: float = 1e-5
    distillation: float = 1.0
    triplet: float = 0.0
    compactness_weight: float = 1.0
    compactness: us.Compactness = "dims"
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.file is not None and self.images is not None:
            raise ValueError("teacher.file is a finished teacher and teacher.images trains one: give one of them.")
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError(
                f"teacher.steps is {self.steps} and teacher.batch_size {self.batch_size}: give at least 1 step and 2 "
                "patches, which correlations and negatives need."
            )
        if min(self.distillation, self.triplet, self.compactness_weight) < 0:
            raise ValueError("The weights of the teacher's losses must not be negative.")
        if self.compactness not in get_args(us.Compactness):
            raise ValueError(f'teacher.compactness is "{self.compactness}"; choose one of dims, samples.')


class US(ReconstructionModule):
    """US with the paper's setting as defaults: three patch sizes, three students each, 256 pixels, Adam 1e-4, batch 1, 100
    epochs, the last one.

    The paper trains one ensemble per category (`data.init_args.setting=per_category`). First the teachers are distilled
    from the backbone; the students then learn them from whole images. Maps are put on the scale of normal images when
    training ends: of those held out (`data.init_args.holdout`), else of the training images, and the record says which.
    No test image takes part.

    Nothing was released. The usual reimplementation's reading is `target=decoded`, `teacher.compactness=samples`,
    `calibration=train` and 15 epochs.

    Args:
        backbone: What the teachers are distilled from: ResNet18's last level, averaged over a patch.
        head: Mean of the patch sizes' maps, not smoothed; image score = maximum (the paper has none).
        optimizer: Adam with weight decay 1e-5 as an L2 term, of all students.
        lr_scheduler: None: the learning rate is constant.
        lr_interval: Whether the schedule goes on after every `epoch` or every `step`.
        image_size: Input size in pixels.
        teacher: Where the teachers come from.
        calibration: `auto`, held-out normal images if there are any, else the training images; or `train`.
        score_parts: Also score error and variance alone, as variants `map=error` and `map=variance`, and each patch
            size, as `patch_size=P`.
        patch_sizes: See `models.us.US`.
        students: See `patch_sizes`.
        target: See `patch_sizes`.
        widths: See `patch_sizes`.
        padding: See `patch_sizes`.
    """

    method = "us"
    recipe = Recipe(resize="pil_bilinear", batch_size=1, max_epochs=100)
    needs_images = True
    reconstructs: ClassVar[bool] = False
    uncached = "teachers and students read pixels"
    network: us.US

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig("resnet18.tv_in1k", (5,)),
        head: HeadConfig = HeadConfig(fusion="mean", image_score="max"),
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-4, weight_decay=1e-5, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        image_size: ImageSize = 256,
        teacher: TeacherConfig = TeacherConfig(),
        calibration: Literal["auto", "train"] = "auto",
        score_parts: bool = False,
        patch_sizes: Sequence[int] = (17, 33, 65),
        students: int = 3,
        target: us.Target = "descriptor",
        widths: dict[int, list[int]] | None = None,
        padding: us.Padding = "zeros",
    ) -> None:
        if len(backbone.levels) != 1 or backbone.standardised:
            raise ValueError(
                "US distils one level of the backbone as it is: give backbone.levels one entry, and no standardised."
            )
        if calibration not in ("auto", "train"):
            raise ValueError(f'calibration is "{calibration}"; choose auto or train.')
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = us.US(
            self.extractor.channels[0],
            patch_sizes=patch_sizes,
            students=students,
            target=target,
            widths=widths,
            padding=padding,
        )
        for size in patch_sizes:
            self.extractor.sizes((size, size))  # a backbone that does not take a patch is refused here
            if padding == "reflect" and min(self.image_size) <= size // 2:
                raise ValueError(
                    f"padding=reflect needs images larger than half a patch, found {self.image_size} for patch size {size}."
                )
        self.map_names = tuple(f"patch size {size}" for size in patch_sizes) if len(patch_sizes) > 1 else ()
        self.teacher, self.calibration, self.score_parts = teacher, calibration, score_parts
        if teacher.file is None and teacher.images is None:
            self.untiled = (
                "its teachers learn from patches of whole training images; give teacher.file or teacher.images"
            )
        self.notes = {"teacher": "", "calibration": ""}
        self.calibrated_epochs = -1

    # ---- teachers ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.network.has_teachers:
            return  # resumed: they came with the checkpoint
        if self.teacher.file is not None:
            self._load_teachers()
        else:
            self._train_teachers()
            if self.trainer.world_size > 1:  # equal up to rounding before
                self.network.teachers.load_state_dict(
                    self.trainer.strategy.broadcast(self.network.teachers.state_dict())
                )
        self._measure_targets()

    def _load_teachers(self) -> None:
        try:
            found = read_state_dict(self.teacher.file)
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error
        found = {name.rpartition("teachers.")[2]: value for name, value in found.items()}
        wanted = self.network.teachers.state_dict()
        if self.network.target == "descriptor":
            wanted = {name: value for name, value in wanted.items() if ".decode." not in name}
        where = f"The teacher's file {self.teacher.file}"
        try:
            check_fit(found, wanted, where)
            check_finite({name: found[name] for name in wanted}, where)
        except ValueError as error:
            raise DataError(str(error)) from error
        self.network.teachers.load_state_dict({name: found[name] for name in wanted}, strict=False)
        self.notes["teacher"] = (
            f"teacher from a file (sha256 {file_sha256(self.teacher.file)[:12]}); the backbone is not used"
        )

    def _train_teachers(self) -> None:
        """The same on every process: all draws come from the data module's seed."""
        data, options = self.trainer.datamodule, self.teacher
        images = self._teacher_images()
        self.extractor.to(self.device)
        for size in self.network.patch_sizes:
            teacher = self.network.teachers[str(size)].to(self.device).requires_grad_(True)
            optimizer = Adam(teacher.parameters(), lr=options.lr, weight_decay=options.weight_decay)
            patches = RandomPatches(images, data.seed + size)
            track = work_progress(self.trainer, f"US: teacher of {size} x {size} patches")
            with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                for _ in track(range(options.steps)):
                    loss = self._teacher_loss(teacher, patches, size)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            if not loss.isfinite():
                raise NonFiniteLossError(
                    f"The loss of the teacher of patch size {size} is {loss.item()}: lower teacher.lr "
                    "(--model.init_args.teacher.lr)."
                )
            teacher.requires_grad_(False)
        of = "images of a folder" if options.images else "training images, not ImageNet"
        self.notes["teacher"] = (
            f"teacher distilled on {len(images)} {of}, {options.steps} steps, compactness between {options.compactness}; "
            "teachers and students are trained from scratch"
        )

    def _teacher_loss(self, teacher: us.DecodedNetwork, patches: RandomPatches, size: int) -> Tensor:
        options = self.teacher
        anchors, positives = patches.draw(options.batch_size, size, positives=options.triplet > 0)
        anchors = self._normalise(anchors)
        features = self.extractor(anchors)[-1].mean(dim=(2, 3))
        descriptors = teacher.patches(anchors)
        decoded = teacher.decoded(descriptors) if self.network.target == "decoded" else teacher.decode(descriptors)
        loss = options.distillation * us.distillation_loss(decoded, features)
        if options.compactness_weight:
            compared = decoded if self.network.target == "decoded" else descriptors
            loss = loss + options.compactness_weight * us.compactness_loss(compared, options.compactness)
        if positives is not None:
            others = teacher.patches(self._normalise(positives))
            loss = loss + options.triplet * us.triplet_loss(descriptors, others, descriptors.roll(1, 0), options.delta)
        return loss

    def _normalise(self, pixels: Tensor) -> Tensor:
        data = self.trainer.datamodule
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
        return ((pixels - mean) / std).to(self.device)

    def _teacher_images(self) -> list[np.ndarray]:
        """Images to cut patches from, uint8 at the run's size."""
        data = self.trainer.datamodule
        if self.teacher.images is not None:
            paths = [path for path in Path(self.teacher.images).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
            if not paths:
                raise DataError(
                    f"teacher.images: no image in {self.teacher.images}. Give a folder of images, or leave it out to cut the "
                    "patches from the training images."
                )
            return [resize_image(read_image(path), self.image_size, data.resize) for path in _evenly(sorted(paths))]
        ids = _evenly(data.table[data.table["split"] == "train"].id.tolist())
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
        images: list[np.ndarray] = []
        for first in range(0, len(ids), BATCH):
            pixels = data.image_batch(ids[first : first + BATCH])["image"] * std + mean
            images += list((pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        return images

    @torch.no_grad()
    def _measure_targets(self) -> None:
        """Mean and deviation of the teachers' channels over all positions of all training images."""
        network = self.network.to(self.device)
        found: dict[int, list[Tensor]] = {size: [] for size in network.patch_sizes}
        with torch.autocast(self.device.type, enabled=False):
            for batch in self._batches(self.trainer.datamodule.train_images()):
                for size, parts in found.items():
                    for image in batch["image"].split(1):
                        output = network.output(network.teachers[str(size)], image)
                        parts.append(us.moments(output[0].flatten(1)).cpu())
                    found[size] = [us.merged(parts)]
        own = Group().gather_objects(found)
        for size in network.patch_sizes:
            network.scales[str(size)].set(*us.mean_and_std(us.merged([m for part in own for m in part[size]])))

    # ---- students ----------------------------------------------------------------------------------------------------

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Sum over patch sizes and students of the squared distances; each student learns as if it were alone."""
        losses = {size: self.network.student_losses(size, batch["image"]) for size in self.network.patch_sizes}
        if self.training and len(losses) > 1:
            self.keep({f"loss_{size}": torch.stack(of).detach().mean() for size, of in losses.items()}, batch)
        return torch.stack([loss for of in losses.values() for loss in of]).sum()

    def compiled_parts(self) -> list[nn.Module]:
        return [student for students in self.network.students.values() for student in students]

    def reconstruct(self, batch: Mapping[str, Any]) -> list[Pair]:
        raise ValueError("US reconstructs nothing: its students learn a teacher's descriptors.")

    # ---- the scale of maps -------------------------------------------------------------------------------------------

    def before_scoring(self, last_epoch: bool) -> None:
        self._calibrate(self.current_epoch + 1)

    def on_train_end(self) -> None:
        self._calibrate(self.trained_epochs)

    def on_test_start(self) -> None:
        # A training that was cut off after its last epoch is resumed without any, and its end is not announced.
        if self.network.has_teachers and self.calibrated_epochs != self.trained_epochs:
            self._calibrate(self.trained_epochs)

    @torch.no_grad()
    def _calibrate(self, epochs: int) -> None:
        """Mean and deviation of error and variance over all pixels of normal images, which no student has learned if any
        are held out."""
        if self.calibrated_epochs == epochs:
            return
        data, network, was_training = self.trainer.datamodule, self.network, self.training
        held_out = self.calibration == "auto" and data.normal_split == "val"
        self.eval()
        own: dict[int, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            for batch in self._batches(data.val_dataloader() if held_out else data.train_images()):
                for number, image in zip(batch["id"].tolist(), batch["image"].split(1), strict=True):
                    values = torch.stack([part.flatten() for reading in network(image) for part in reading])
                    own[number] = us.moments(values).cpu()
        self.train(was_training)
        # In the order of their ids, each once: the figures then depend on neither order nor processes.
        images = {number: value for part in Group().gather_objects(own) for number, value in part.items()}
        mean, std = us.mean_and_std(us.merged([images[number] for number in sorted(images)]))
        network.statistics.copy_(torch.stack([mean, std], dim=1).reshape(len(network.patch_sizes), 4))
        kind = "held-out normal images" if held_out else "training images"
        self.notes["calibration"] = f"maps on the scale of {len(images)} {kind}"
        self.calibrated_epochs = epochs

    def _batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        for batch in loader:
            yield self.trainer.strategy.batch_to_device(batch)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, ScoredMaps]:
        with torch.autocast(self.device.type, enabled=False):
            parts = [self.network.scaled(self.network(part)) for part in in_parts(batch["image"].float(), CHUNK)]
        errors, variances = (
            [torch.cat(maps) for maps in zip(*(part[n] for part in parts), strict=True)] for n in (0, 1)
        )
        maps = [sum(parts) for parts in zip(errors, variances, strict=True)] if variances else errors
        found = {"": self.head.score(maps, self.image_size)}
        if self.score_parts and variances:
            found["map=error"] = self.head.score(errors, self.image_size)
            found["map=variance"] = self.head.score(variances, self.image_size)
        if self.score_parts and len(maps) > 1:
            for number, size in enumerate(self.network.patch_sizes):
                found[f"patch_size={size}"] = self.head.score(maps, self.image_size, selection=[number])
        return found

    def record_notes(self) -> list[str]:
        return [note for note in self.notes.values() if note]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["us"] = {"notes": dict(self.notes), "calibrated_epochs": self.calibrated_epochs}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.notes = dict(checkpoint["us"]["notes"])
        self.calibrated_epochs = checkpoint["us"]["calibrated_epochs"]


def _evenly(values: list) -> list:
    """At most `POOL` of them."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(POOL, len(values))).astype(int))]
