"""A finished run as a function of images: `load_run("results/runs/single/mine")`, without its data, offline.

The record says what was built, the checkpoint beside it (`<results>/work`) holds the weights, and the frozen backbone
comes from where the record says: a Python package, a file of the recorded sha256, timm's cache, or a seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from datamodules.errors import DataError
from datamodules.handed_over import Images, Preparation
from datamodules.tiling import TileConfig
from lightning_modules.base import ReconstructionModule
from lightning_modules.running import checkpoints, recorded_configuration
from lightning_modules.running.backbone import recorded_weights
from lightning_modules.running.earlier import translated
from lightning_modules.running.methods import build, import_methods
from lightning_modules.running.settings import RunConfig, work_folder
from lightning_modules.stitching import of_photograph
from models.head import ScoredMaps
from results.aggregator.records import StoredRecord, read_record
from results.common.pair import label

OF_TRAINING = ("optimizer", "lr_scheduler", "lr_interval")
"""Arguments of methods that a trained one does not need."""
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class TrainedModel:
    """A finished run's model: images in, `models.head.ScoredMaps` out, as `predict` scores them.

    Args:
        module: The trained method.
        preparation: How its images are resized and normalised.
        precision: The run's, as Lightning calls it; mixed ones are followed, others are float32.
        batch_size: Images that are scored at a time.
        category, dataset: Of the images, for methods that must be told; "" for unknown.

    Attributes:
        module: The same in eval mode, a `lightning_modules.base.ReconstructionModule`; `to` moves it.
    """

    def __init__(
        self,
        module: ReconstructionModule,
        preparation: Preparation,
        precision: str = "32-true",
        batch_size: int = 32,
        category: str = "",
        dataset: str = "",
    ) -> None:
        self.module, self.preparation = module.eval(), preparation
        self.precision, self.batch_size = precision, batch_size
        self.category, self.dataset = category, dataset

    def to(self, device: torch.device | str) -> TrainedModel:
        """Moves the model; returns itself."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Images) -> ScoredMaps:
        """Scores images of any sizes; each is resized and normalised as in the run.

        Args:
            images: A batch (B, 3, H, W), or one image or a list of images, each a tensor (3, H, W), a PIL image, or the
                path of a file. Tensors are RGB: uint8, or floats in [0, 1], which are rounded to a file's 256 levels.

        Returns:
            On the model's device: `maps` float32 (B, H, W) at the size that the run's maps have, `image_scores` float32
            (B,), and `level_maps`, a list of (B, h, w). Higher is more anomalous.

        Raises:
            datamodules.errors.DataError: no image, a file that cannot be read, or a tensor of another shape, type or range; or
                photographs of different sizes to a run with tiles, whose maps have the photographs' size.
        """
        with _as_trained(self.module.device, self.precision):
            if self.preparation.tiles is not None:
                return self._stitched(images)
            parts = [self.score(batch) for batch in self.preparation.batches(images, self.batch_size)]
        maps, scores, levels = zip(*parts, strict=True)
        return ScoredMaps(torch.cat(maps), torch.cat(scores), [torch.cat(level) for level in zip(*levels, strict=True)])

    def _stitched(self, images: Images) -> ScoredMaps:
        """Photographs in tiles."""
        told = {"category": [self.category], "dataset": [self.dataset]} if self.category else {}
        parts: list[ScoredMaps] = []
        for photograph in self.preparation.photographs(images, self.batch_size):
            parts.append(of_photograph(self.module.evaluate, photograph, self.module.device, **told))
            first, last = (tuple(part.maps.shape[1:]) for part in (parts[0], parts[-1]))
            if first != last:
                raise DataError(
                    f"Photographs of {first[1]} x {first[0]} and of {last[1]} x {last[0]} pixels: this run cuts them into tiles, "
                    "and its maps are as large as they. Give those of one size at a time."
                )
        return ScoredMaps(torch.cat([p.maps for p in parts]), torch.cat([p.image_scores for p in parts]), [])

    def score(self, images: torch.Tensor) -> ScoredMaps:
        """Scores normalised images, float32 (B, 3, H, W), all at once and in the precision of the surrounding context."""
        batch: dict[str, Any] = {"image": images.to(self.module.device)}
        if self.category:
            batch |= {"category": [self.category] * len(images), "dataset": [self.dataset] * len(images)}
        return self.module.evaluate(batch)[""]


@contextlib.contextmanager
def _as_trained(device: torch.device, precision: str) -> Iterator[None]:
    """Convolutions in full float32, as in training, and the run's mixed precision."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.autocast(device.type, MIXED.get(precision), enabled=precision in MIXED):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def load_run(
    record: str | Path,
    checkpoint: str | Path | None = None,
    category: str | None = None,
    backbone_file: str | Path | None = None,
) -> TrainedModel:
    """The model of a finished run, on the CPU, in eval mode. No training data is needed, and nothing is downloaded.

    Args:
        record: The run's record, `<results>/runs/<sweep>/<run>`.
        checkpoint: Its weights; by default those in `<results>/work/<sweep>/<run>/checkpoints`.
        category: Of the images, as the record names it, or `dataset/category`: which model to take of a run with one
            model per category, and what to tell a method that asks (HVQ-Trans with its labels, ULSAD of several datasets).
        backbone_file: The backbone's weight file, where the run's was a file that lies elsewhere now.

    Raises:
        FileNotFoundError: the weights, or those of the backbone, are not on this machine; says which and where it looked.
        ValueError: the record, the checkpoint or the weight file is damaged or not the run's, the record names a class
            that is not the project's own, or the category is unknown or must be given.
    """
    folder = Path(record)
    stored = read_record(folder)
    dataset, name = _pair(stored, category)
    if checkpoint is None and _several(stored):
        return load_run(_part(folder, stored, dataset, name), None, name, backbone_file)
    weights = _weights(folder, checkpoint)
    content = checkpoints.read(weights)
    configuration = translated(yaml.safe_load(stored.config_text))
    module = _module(folder, stored, configuration, backbone_file)
    try:
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{weights} does not hold the weights of {folder}: {str(error).splitlines()[0]}") from error
    several = len(stored.record.datasets) > 1
    preparation = _preparation(module, stored, configuration)
    # A method that recovers pixels has no data module to ask.
    module.extractor.mean, module.extractor.std = preparation.mean, preparation.std
    return TrainedModel(
        module,
        preparation,
        str(stored.record.provenance.get("precision", "32-true")),
        category=label(dataset if several else "", name),
        dataset=dataset,
    )


def _module(
    folder: Path, stored: StoredRecord, configuration: Any, backbone_file: str | Path | None
) -> ReconstructionModule:
    """The method as the record's configuration describes it, with the frozen backbone's weights and no others."""
    file = folder / "config.yaml"
    section = configuration.get("model") if isinstance(configuration, Mapping) else None
    arguments = section.get("init_args") if isinstance(section, Mapping) else None
    methods = import_methods().values()
    trains_all = {f"{m.__module__}.{m.__qualname__}" for m in methods if not m.has_backbone}
    own_trunk = isinstance(arguments, Mapping) and section.get("class_path") in trains_all
    if not own_trunk and not (isinstance(arguments, Mapping) and isinstance(arguments.get("backbone"), Mapping)):
        raise ValueError(f"{file} does not describe a model with a backbone, so nothing can be built from it.")
    arguments = {key: value for key, value in arguments.items() if key not in OF_TRAINING}
    section = {"class_path": section.get("class_path"), "init_args": arguments}
    recorded_configuration.check(section, file, methods)
    if own_trunk:  # all weights are in the checkpoint, whatever they started from
        arguments |= {"start": "scratch"} if "start" in arguments else {}
    else:
        _find_backbone(folder, stored, arguments, backbone_file)
    with torch.random.fork_rng(devices=[]):  # the caller's draws do not depend on what is loaded
        module = build(ReconstructionModule, section)
    run = configuration.get("run") or {}
    chosen = RunConfig(protocol=stored.record.protocol, selection=run.get("selection"))
    module.set_protocol(chosen.protocol, chosen.selects)
    return module


def _find_backbone(
    folder: Path, stored: StoredRecord, arguments: dict[str, Any], backbone_file: str | Path | None
) -> None:
    """Puts the weights that the run had into the arguments."""
    places = (work_folder(folder), folder)
    weights = recorded_weights(arguments["backbone"], stored.record.backbone, places, backbone_file)
    arguments["backbone"] = {**arguments["backbone"], "weights": weights}


def _preparation(module: ReconstructionModule, stored: StoredRecord, configuration: Mapping[str, Any]) -> Preparation:
    options = (configuration.get("data") or {}).get("init_args") or {}
    further = {key: options[key] for key in ("bit_depth", "max_megapixels") if options.get(key) is not None}
    mean, std = options.get("mean") or module.extractor.mean, options.get("std") or module.extractor.std
    if (whole := options.get("crop_from")) is not None:
        further["crop_from"] = (whole, whole) if isinstance(whole, int) else tuple(whole)
    if (tiles := options.get("tiles")) is not None:
        further["tiles"] = TileConfig(**tiles)
    return Preparation(
        module.image_size, options.get("resize") or stored.record.resize, tuple(mean), tuple(std), **further
    )


def _weights(folder: Path, given: str | Path | None) -> Path:
    """The run's whole checkpoint."""
    last = work_folder(folder) / "checkpoints" / "last.ckpt" if given is None else Path(given)
    if not last.is_file():
        raise FileNotFoundError(
            f"{last} does not exist: the weights of {folder} are needed. Give their path as checkpoint, or train the run "
            "again."
        )
    return last if given is not None else checkpoints.newest_whole(last)


def _pair(stored: StoredRecord, category: str | None) -> tuple[str, str]:
    """(dataset, category) of the record that a word stands for; two empty texts for None."""
    if category is None:
        return "", ""
    keys = stored.record.category_keys
    fitting = [key for key in keys if category in (key[1], label(*key))]
    if len(fitting) != 1:
        names = [label(*key) for key in keys] if len(stored.record.datasets) > 1 else [key[1] for key in keys]
        what = "stands for several categories" if fitting else "is not a category"
        raise ValueError(f"{category!r} {what} of {stored.name}; it has {', '.join(names)}.")
    return fitting[0]


def part_of(folder: Path, category: str) -> Path:
    """The record whose model is for a category: of a run with one model each that category's own, else the run's.

    Raises:
        FileNotFoundError, ValueError: as `load_run`.
    """
    stored = read_record(folder)
    dataset, name = _pair(stored, category)
    return _part(folder, stored, dataset, name) if _several(stored) else folder


def _several(stored: StoredRecord) -> bool:
    """Whether it is the joint record of one model per category."""
    return stored.record.setting == "per_category" and len(stored.record.category_keys) > 1


def _part(folder: Path, stored: StoredRecord, dataset: str, name: str) -> Path:
    """The record of one category of a run that trained a model for each."""
    if not name:
        names = ", ".join(
            label(d if len(stored.record.datasets) > 1 else "", c) for d, c in stored.record.category_keys
        )
        raise ValueError(f"{folder} holds one model per category; name one of {names} (category=...).")
    parts = work_folder(folder) / "runs" / "categories"
    for file in sorted(parts.glob("*/record.json")):
        if read_record(file.parent).record.category_keys == [(dataset, name)]:
            return file.parent
    raise FileNotFoundError(
        f"The model of {name} is not in {parts}: give the path of its checkpoint, or train it again."
    )
