"""One data module for several datasets and any subset of their categories."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from datamodules.anomalies.sources import Anomalies, AnomalyConfig
from datamodules.augmentation import Augmentation, not_square
from datamodules.cache.entry import FeatureCache
from datamodules.cache.loaders import CachedBatches, CachedImages, cached_loader
from datamodules.dataset import UNKNOWN, ImageSource, LastImage, Row, TableDataset, collate, table_rows
from datamodules.errors import DataError, did_you_mean
from datamodules.images import BIT_DEPTHS, REMARKABLE, check_resize, infer_bit_depth, read_header
from datamodules.problems import WARNING, describe
from datamodules.readers import Listing, list_dataset, raise_on_errors
from datamodules.sample_table import (
    SPLITS,
    SampleTable,
    category_keys,
    concatenate,
    content_hash,
    fingerprint,
    hold_out,
)
from datamodules.sampling import EvalSampler, TrainSampler, check_sampling
from datamodules.subset import left_out
from datamodules.tree import IMAGE_SUFFIXES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SETTINGS = ("unified", "per_category")
NORMAL = {"val": 1000, "train": 100}
"""Split -> how many of its normal images are picked, evenly, to compare scores with."""
SMALL = 1000
"""Up to this many training images, reading them in the main process is quicker than starting workers."""


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of the run.

    Args:
        name: reader: mvtec_ad, mvtec_loco, btad, mpdd, visa, folder, photos or synthetic.
        root: its folder; "" for photos, which come with the project.
        categories: the subset to use, None for all; also a text "bottle,cable".
        label: its name in tables, default `name`; needed when one reader is used twice.
    """

    name: str
    root: str = ""
    categories: tuple[str, ...] | str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        categories = self.categories
        if isinstance(categories, str):
            categories = tuple(part.strip() for part in categories.split(",") if part.strip())
        object.__setattr__(self, "categories", tuple(categories) if categories else None)
        object.__setattr__(self, "root", str(self.root or ""))


class UnifiedDataModule(L.LightningDataModule):
    """Datasets on disk -> batches for one model of all categories.

    A batch is a dict: `image` float32 (B, 3, H, W) normalised; `mask` bool (B, 1, H, W); `has_mask` bool (B,), False
    for an anomalous image without a mask file; `label` int64 (B,); `id` int64 (B,), the row of `table`; and lists of B
    texts `category` (key), `dataset`, `anomaly_type`, `path`.

    Args:
        datasets: what to read. With several, category keys are `dataset/category`.
        image_size: side of a square, or (height, width). None stands for the method's paper value, which the command
            line fills in.
        resize: pil_bilinear, pil_lanczos, pil_nearest (PIL, the first two antialiased) or opencv_bilinear (not
            antialiased). None as above.
        batch_size: training images per step and process. None as above.
        eval_batch_size: images per step in validation, test and prediction.
        num_workers: worker processes; None takes 0 for up to 1000 training images, else one less than the cores, at
            most 8. Batches do not depend on it.
        sampling: natural, balanced (each category equally often) or balanced_datasets (each dataset equally often, then
            each of its categories). An epoch has as many draws as there are training images.
        holdout: fraction of each category's normal training images that becomes split val, chosen by file name. A
            dataset with a validation folder of its own (MVTec LOCO) keeps that instead.
        augmentation: entry of `datamodules.augmentation.AUGMENTATIONS`.
        anomalies: puts synthetic anomalies into training images, after the augmentation. Training batches then carry
            `clean` (B, 3, H, W), the image without, and `mask` says where the anomaly is; the label stays 0.
        mean, std: normalisation of pixels in [0, 1]. None stands for what the backbone's weights were trained with,
            which the command line fills in, and Lightning's trainer before the first batch; ImageNet's where there is no
            model.
        seed: of shuffling and augmentation.
        bit_depth: significant bits of 16-bit images; None infers them per dataset from its training images.
        drop_last: leave out a last training batch that is not full. None stands for the method's recipe.
        test_subset: full, or drop_last_32, what released code of some methods evaluates (see `datamodules.subset`). None
            is full, unless the protocol is as_released and the method's recipe says otherwise.
        setting: unified, one model for all categories, or per_category: the command line trains one model for each
            category in turn and puts their results into one record.
        cache_mb: without workers, keep up to this much of the resized images in memory.
        predict_root: folder (searched recursively, without the masks in ground_truth) or file for `predict_dataloader`.

    Attributes after `setup`:
        table: SampleTable of all splits.
        categories: category keys in table order.
        fingerprint: sha256 of the data used, as split on disk. `fingerprints`: the same per dataset.
        bit_depths: significant bits of the 16-bit images per dataset that has any.
        image_size: (height, width).
    """

    def __init__(
        self,
        datasets: list[DatasetConfig],
        image_size: int | tuple[int, int] | None = None,
        resize: str | None = None,
        batch_size: int | None = None,
        eval_batch_size: int = 32,
        num_workers: int | None = None,
        sampling: str = "natural",
        holdout: float = 0.0,
        augmentation: str = "none",
        anomalies: AnomalyConfig | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        bit_depth: int | None = None,
        drop_last: bool | None = None,
        test_subset: str | None = None,
        setting: str = "unified",
        cache_mb: int = 256,
        predict_root: str | None = None,
    ) -> None:
        super().__init__()
        check_sampling(sampling)
        if not 0 <= holdout < 1:
            raise DataError(f"holdout is a fraction of the normal training images, 0 <= holdout < 1, found {holdout}.")
        if bit_depth is not None and bit_depth not in BIT_DEPTHS:
            raise DataError(f"bit_depth must be one of {BIT_DEPTHS} or None, found {bit_depth}.")
        if eval_batch_size < 1 or (batch_size is not None and batch_size < 1):
            raise DataError(f"Batch sizes must be at least 1, found {batch_size} and {eval_batch_size}.")
        if (mean is None) != (std is None):
            raise DataError(f"mean and std belong together: give both or neither, found mean={mean}, std={std}.")
        if std is not None and (len(mean) != 3 or len(std) != 3 or min(std) <= 0):
            raise DataError(f"mean and std are three numbers each, std positive; found mean={mean}, std={std}.")
        labels = Counter(config.label or config.name for config in datasets)
        twice = [label for label, count in labels.items() if count > 1]
        if twice:
            raise DataError(f"Two datasets are called {twice[0]!r}: give one of them a `label` of its own.")
        self.datasets = list(datasets)
        self.image_size = image_size
        self.resize = resize
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.sampling = sampling
        self.holdout = holdout
        self.augmentation = augmentation
        self.anomalies = anomalies
        self._normalisation_given = mean is not None
        self.mean, self.std = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
        self.seed = seed
        self.bit_depth = bit_depth
        self.drop_last = bool(drop_last)
        self.test_subset = test_subset or "full"
        if setting not in SETTINGS:
            raise DataError(f"Unknown setting {setting!r}. {did_you_mean(setting, SETTINGS)}")
        self.setting = setting
        self.left_out: frozenset[int] = frozenset()
        self.cache_mb = cache_mb
        self.predict_root = predict_root
        self.table: SampleTable | None = None
        self.categories: list[str] = []
        self.fingerprint = ""
        self.fingerprints: dict[str, str] = {}
        self.bit_depths: dict[str, int] = {}
        self._source: ImageSource | None = None
        self._cache: FeatureCache | None = None
        self._symmetric: dict[tuple[int, int], int] = {}
        self._resident: dict[tuple[int, ...], CachedBatches] = {}
        self._resident_on: torch.device | None = None
        self._resident_room = 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read the table and run the cheap part of `check` (names and headers, nothing decoded). Done once.

        Raises:
            DataError: a missing option, an unknown name, or data with errors.
        """
        if self._source is None:
            self._check_filled_in()
        if stage == "predict" and self.predict_root is not None:
            self._source = self._source or self._make_source(self._predict_depth(), {})
            return
        if self.table is not None:
            return
        if not self.datasets:
            raise DataError("No dataset is named: give `datasets` at least one entry with a name and a root.")
        listings = {
            config.label or config.name: list_dataset(config.name, config.root, config.categories, config.label)
            for config in self.datasets
        }
        bit_depths: dict[str, int] = {}
        for label, listing in listings.items():
            raise_on_errors(listing)
            self._warn(label, listing)
            self._settle_modes(label, listing, bit_depths)
        table = concatenate(listing.table for listing in listings.values())
        roots = {label: listing.root for label, listing in listings.items()}
        self.fingerprints = {label: fingerprint(listing.table, roots) for label, listing in listings.items()}
        single = len(listings) == 1  # what every run does before it starts is kept short
        self.fingerprint = self.fingerprints[next(iter(listings))] if single else fingerprint(table, roots)
        self.table = hold_out(table, self.holdout)
        self.categories = list(dict.fromkeys(category_keys(table)))
        if self.setting == "per_category" and len(self.categories) > 1:
            raise DataError(
                f"setting per_category is one model per category, but {len(self.categories)} are read here. `fit` trains "
                "them one after the other; for anything else name one category."
            )
        self.left_out = left_out(self.table, self.test_subset)
        thresholds = {label: listing.reader.mask_threshold for label, listing in listings.items()}
        self.bit_depths = bit_depths
        self._roots, self._rules = roots, {"bit_depths": bit_depths, "thresholds": thresholds}
        self._source = self._make_source(bit_depths, thresholds)

    def _check_filled_in(self) -> None:
        for option in ("image_size", "resize", "batch_size"):
            if getattr(self, option) is None:
                raise DataError(
                    f"UnifiedDataModule: {option} is None. The command line fills in the method's paper value; "
                    f"when you use the data module yourself, give {option}."
                )
        check_resize(self.resize)
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"image_size is a positive side or (height, width), found {self.image_size}.")
        self.image_size = size

    def _make_source(self, bit_depths: dict[str, int], thresholds: dict[str, int]) -> ImageSource:
        cache = 0 if self._workers() else self.cache_mb * 2**20
        return ImageSource(self.image_size, self.resize, bit_depths, thresholds, cache)

    @staticmethod
    def _warn(label: str, listing: Listing) -> None:
        found = [problem for problem in listing.problems if problem.severity == WARNING]
        if found:
            warnings.warn(f"{label}: {len(found)} remarks on the data:\n{describe(found, limit=5)}", stacklevel=3)

    def _settle_modes(self, label: str, listing: Listing, bit_depths: dict[str, int]) -> None:
        """One warning per dataset about odd image modes, and the bit depth of 16-bit images."""
        files: dict[str, list[str]] = {}
        for path in listing.table["image_path"]:
            mode = _odd_mode(path)
            if mode is not None:
                files.setdefault(mode, []).append(path)
        notes = [
            f"{len(paths)} images are {mode} (e.g. {paths[0]}): {REMARKABLE[mode]}" for mode, paths in files.items()
        ]
        deep = files.get("16-bit")
        if deep:
            train = set(listing.table.loc[listing.table["split"] == "train", "image_path"])
            bits = self.bit_depth or infer_bit_depth([path for path in deep if path in train] or deep)
            bit_depths[label] = bits
            how = "as declared" if self.bit_depth else "inferred from the brightest values; declare bit_depth to fix it"
            notes.append(f"16-bit images are read as {bits} bits ({how})")
        if notes:
            warnings.warn(f"{label}: " + "; ".join(notes), stacklevel=3)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise pixels so from now on, unless the constructor was given a mean and a std."""
        if not self._normalisation_given:
            self.mean, self.std = tuple(mean), tuple(std)

    def provenance(self) -> list[dict[str, Any]]:
        """Per dataset: name, fingerprint and categories, for the run record."""
        return [
            {
                "name": str(name),
                "fingerprint": self.fingerprints[str(name)],
                "categories": list(dict.fromkeys(rows["category"])),
            }
            for name, rows in self.table.groupby("dataset", sort=False)
        ]

    def dataset_of(self) -> dict[str, str]:
        """Category key -> dataset, in table order."""
        return dict(zip(category_keys(self.table), self.table["dataset"], strict=True))

    # -- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Training images in the order of the own seeded sampler."""
        rows = self._rows("train")
        dataset = TableDataset(rows, self._source, self.mean, self.std, self._augmentation(), self._anomalies())
        sampler = TrainSampler(
            dataset,
            [row.dataset for row in rows],
            [row.category for row in rows],
            self.sampling,
            self.seed,
            *self._place(),
        )
        return self._loader(dataset, sampler, self.batch_size, self.drop_last)

    def train_images(self) -> DataLoader:
        """Every training image exactly once over all processes, in table order and without augmentation."""
        return self._eval_loader(self._rows("train"))

    @property
    def normal_split(self) -> str:
        """Where `normal_images` come from: val if normal images are held out, else train."""
        return "val" if (self.table["split"] == "val").any() else "train"

    def normal_images(self) -> DataLoader:
        """Normal images to compare scores with, at most `NORMAL` of them, each once over all processes."""
        return self._eval_loader(self._normal_rows())

    def _normal_rows(self) -> list[Row]:
        rows = self._rows(self.normal_split)
        count = min(NORMAL[self.normal_split], len(rows))
        return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]

    def val_dataloader(self) -> DataLoader | list:
        """Held-out normal images; an empty list if nothing is held out."""
        rows = self._rows("val")
        return self._eval_loader(rows) if rows else []

    def test_dataloader(self) -> DataLoader:
        """Every test image exactly once over all processes; of data without any, the `normal_images`.

        The latter measure nothing, but give a run that only predicts its scale.
        """
        return self._eval_loader(self._test_rows() or self._normal_rows())

    @property
    def has_test_images(self) -> bool:
        """Whether anything can be measured."""
        return bool(self._test_rows())

    def test_images(self) -> dict[str, int]:
        """Category key -> how many images `test_dataloader` gives, over all processes."""
        return dict(Counter(row.category for row in self._test_rows() or self._normal_rows()))

    def _test_rows(self) -> list[Row]:
        return [row for row in self._rows("test") if row.id not in self.left_out]

    def image_batch(self, ids: Sequence[int]) -> dict[str, Any]:
        """One batch of chosen images, by id, read from disk whether or not features are cached."""
        rows = {row.id: row for split in SPLITS for row in self._rows(split)}
        dataset = TableDataset([rows[i] for i in ids], self._source, self.mean, self.std)
        return collate([dataset[position] for position in range(len(dataset))])

    def predict_dataloader(self) -> DataLoader:
        """Images under `predict_root`: label -1, anomaly_type "unknown", category "", no masks."""
        if self.predict_root is None:
            raise DataError("Nothing to predict on: give the data option predict_root, a folder of images or a file.")
        rows = [Row(number, "", "", UNKNOWN, "unknown", path, ()) for number, path in enumerate(self._predict_paths())]
        return self._eval_loader(rows)

    def _predict_paths(self) -> list[str]:
        root = Path(self.predict_root).expanduser()
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found = [p for p in found if not p.name.startswith(".") and "ground_truth" not in p.relative_to(root).parts]
        paths = list(map(str, found))
        if not paths:
            raise DataError(f"predict_root {root}: no image there (looked for {', '.join(IMAGE_SUFFIXES)}).")
        return paths

    def _predict_depth(self) -> dict[str, int]:
        """The bit depth of 16-bit images under `predict_root`: the declared one, which a run's configuration holds."""
        if self.bit_depth is not None:
            return {"": self.bit_depth}
        deep = [path for path in self._predict_paths() if _odd_mode(path) == "16-bit"]
        if not deep:
            return {}
        bits = infer_bit_depth(deep)
        warnings.warn(
            f"{len(deep)} 16-bit images are read as {bits} bits (inferred); declare bit_depth to fix it", stacklevel=3
        )
        return {"": bits}

    def _rows(self, split: str) -> list[Row]:
        if self.table is None:
            raise DataError("Call setup() before asking for batches.")
        return table_rows(self.table, split)

    def _augmentation(self) -> Augmentation | None:
        return None if self.augmentation == "none" else Augmentation(self.augmentation, self.categories)

    def _anomalies(self) -> Anomalies | None:
        if self.anomalies is None:
            return None
        return Anomalies(self.anomalies, self._rows("train"), self._source.load)

    def describe_anomalies(self) -> str:
        """What anomalies training images get, in words for the run's record."""
        return self._anomalies().describe() if self.anomalies is not None else ""

    def _eval_loader(self, rows: Sequence[Row]) -> DataLoader:
        dataset = TableDataset(rows, self._source, self.mean, self.std)
        return self._loader(dataset, EvalSampler(dataset, *self._place()), self.eval_batch_size)

    # -- cached features -------------------------------------------------------------------------------------------

    def symmetric_rows(self) -> list[Row] | None:
        """Training images as the augmentation flips and turns them; None if they are changed in more ways than that.

        Raises:
            DataError: images would be turned by 90 degrees that are not square.
        """
        if self.anomalies is not None:
            return None
        augmentation = self._augmentation()
        if augmentation is None:
            return []
        found = {key: augmentation.symmetries(key) for key in self.categories}
        if None in found.values():
            return None
        height, width = self.image_size
        turned = [key for key, symmetries in found.items() if any(symmetry % 2 for symmetry in symmetries)]
        if turned and height != width:
            raise not_square(turned[0])
        # Those of held-out images too: an entry then serves any holdout.
        rows = [row for split in ("train", "val") for row in self._rows(split)]
        rows.sort(key=lambda row: row.id)
        return [row._replace(symmetry=symmetry) for row in rows for symmetry in found[row.category] if symmetry]

    def all_images(self, first: int, batch_size: int, symmetric: Sequence[Row] = ()) -> DataLoader:
        """Every image of the table in the order of ids, then ``symmetric``, each with its uint8 ``pixels`` (3, H, W).

        ``first`` of them are left out.
        """
        rows = sorted((row for split in SPLITS for row in self._rows(split)), key=lambda row: row.id)
        rows = [*rows, *symmetric][first:]
        # Every image is read once, but for symmetries: those of one image follow each other.
        source = LastImage(ImageSource(self.image_size, self.resize, **self._rules))
        dataset = TableDataset(rows, source, self.mean, self.std, pixels=True)
        return DataLoader(
            dataset, batch_size, num_workers=self._workers(), collate_fn=collate, worker_init_fn=_quiet_worker
        )

    def content(self) -> str:
        """Hash of all images and masks in the order of their ids, for the key of a cache; see `content_hash`."""
        return content_hash(self.table, self._roots, self._rules)

    def serve_images_from(self, cache: FeatureCache) -> None:
        """From now on images and masks of the table are read, decoded and resized, from an entry that holds them."""
        self._source = CachedImages(cache, self._source)

    def serve_from(
        self, cache: FeatureCache, device: torch.device, resident_bytes: int, symmetric: Sequence[Row] = ()
    ) -> None:
        """From now on training, validation and test batches carry ``features`` from the cache instead of images.

        Args:
            cache: An entry for this table.
            symmetric: The rows of the entry that follow those of the table.
            device: Where training happens; splits are copied there once, as long as they fit.
            resident_bytes: How much may be copied; what does not fit is read from disk batch by batch.
        """
        self._cache, self._resident_on, self._resident_room = cache, device, resident_bytes
        trained = {row.id for row in self._rows("train")} if symmetric else set()
        places = enumerate(symmetric, len(self.table))
        self._symmetric = {(row.id, row.symmetry): place for place, row in places if row.id in trained}
        self._resident.clear()

    def _served(self, rows: list[Row]) -> CachedBatches:
        """The rows' batches, copied to the device if they fit; made once per split."""
        key = tuple(row.id for row in rows)
        if key not in self._resident:
            ids = set(key)
            symmetric = {which: place for which, place in self._symmetric.items() if which[0] in ids}
            needed = (len(rows) + len(symmetric)) * sum(level[0].nbytes for level in self._cache.levels)
            normalised = TableDataset(rows, self._source, self.mean, self.std).normalised
            fits = needed <= self._resident_room
            self._resident_room -= needed if fits else 0
            device = self._resident_on if fits else None
            self._resident[key] = CachedBatches(self._cache, rows, normalised, device, symmetric, self._augmentation())
        return self._resident[key]

    def _loader(
        self, dataset: TableDataset, sampler: DistributedSampler, batch_size: int, drop_last: bool = False
    ) -> DataLoader:
        workers = self._workers()
        if self._cache is not None and dataset.rows[0].label != UNKNOWN:
            workers = 0 if self._resident_on.type == "cpu" else workers  # a batch is one copy of a millisecond
            return cached_loader(self._served(dataset.rows), sampler, batch_size, drop_last, workers)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            # An own generator: loaders then take nothing from the global one that dropout and noise draw from.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.table is None or (self.table["split"] == "train").sum() <= SMALL:
            return 0
        return max(0, min(8, (os.cpu_count() or 1) - 1))

    def _place(self) -> tuple[int, int]:
        """(number of processes, rank of this one)."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0


def _odd_mode(path: str) -> str | None:
    """The mode of an image that deserves a word, from its header; None for any other."""
    mode = read_header(path).mode if path.lower().endswith((".png", ".tif", ".tiff")) else None
    return mode if mode in REMARKABLE else None


def _quiet_worker(worker: int) -> None:
    """One thread per worker: OpenCV would otherwise start one per core in each of them."""
    cv2.setNumThreads(0)
