"""One data module for several datasets and any subset of their categories."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from datamodules import augmentation as policies
from datamodules import training_set
from datamodules.anomalies.sources import Anomalies, AnomalyConfig
from datamodules.augmentation import Augmentation
from datamodules.cache.entry import FeatureCache
from datamodules.cache.loaders import CachedImages, CachedSplits, cached_loader, symmetric_rows
from datamodules.dataset import (
    UNKNOWN,
    Batch,
    ImageSource,
    LastImage,
    Row,
    TableDataset,
    TrainingViews,
    collate,
    image_loader,
    table_rows,
    usual_workers,
)
from datamodules.errors import DataError
from datamodules.images import BIT_DEPTHS, MASK_RESIZES, MAX_MEGAPIXELS, check_crop, check_resize, shown_size
from datamodules.prediction import PhotographSource, depth_of, unknown_rows
from datamodules.problems import number_of
from datamodules.reading import DatasetConfig, Reading, first_categories, read_datasets
from datamodules.remarks import cropped_masks, held_out, tested_and_trained, vanishing_masks
from datamodules.sample_table import (
    FEWEST_HELD_OUT,
    SPLITS,
    SampleTable,
    category_keys,
    content_hash,
    fingerprint,
    hold_out,
)
from datamodules.sampling import EvalSampler, TrainSampler, check_sampling
from datamodules.subset import FULL, TEST_SUBSETS, left_out
from datamodules.tiled import PhotographDataset, check_photographs, tile_rows
from datamodules.tiling import TileConfig
from results.common.did_you_mean import did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SETTINGS = ("unified", "per_category")
NORMAL = {"val": 1000, "train": 50}
"""Split -> how many normal images of each category are picked, evenly, to compare scores with."""


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
        crop_from: resize to this side, or (height, width), and keep the centre of `image_size`, of images and masks alike
            (Dinomaly and INP-Former: 448, of which 392 are kept). What the margin holds of defects is neither seen nor
            measured; how much that is, is said and recorded. None: no crop.
        batch_size: training images per step and process. None as above.
        eval_batch_size: images per step in validation, test and prediction.
        num_workers: worker processes; None takes 0 for up to 1000 training images, else one less than the cores, at
            most 8. Batches do not depend on it.
        sampling: natural, balanced (each category equally often) or balanced_datasets (each dataset equally often, then
            each of its categories). An epoch has as many draws as there are training images.
        holdout: fraction of each category's normal training images that becomes split val, chosen by file name, for
            thresholds and p-values. A dataset with a validation folder of its own (MVTec LOCO) keeps that instead. None:
            nothing of the papers' datasets, and a fifth of one's own folders where that makes at least 5 images.
        fold: [which, of how many]: leave that fold of each category's normal training images out and keep their scores, for a
            cross-validation. `run.folds` goes through them all. Nothing of the training sees them, unlike `holdout`.
        epoch_images: draws per epoch; None for as many as there are training images. With it, runs on more or fewer images
            make equally many steps. Methods that are fitted in one pass do not heed it.
        category_count: use so many of the categories that are read, the first in the order in which they are named (in the
            dataset's own order where none is): the categories of 2 are among those of 4. None for all.
        shots: train on so many images of each category, chosen by `seed`; None for all. Held-out images stay as they are.
        contamination: share of each category's training images that is replaced by defects of the test set, which are no
            longer tested; chosen by `seed`. They are trained on as if they were normal.
        contamination_reserved: defects for this share leave the test set, trained on or not, so that runs of different
            contamination are tested on the same images. None is `contamination`.
        augmentation: entry of `datamodules.augmentation.AUGMENTATIONS`.
        anomalies: puts synthetic anomalies into training images, after the augmentation. Training batches then carry
            `clean` (B, 3, H, W), the image without, and `mask` says where the anomaly is; the label stays 0.
        std: See `mean`.
        mean: normalisation of pixels in [0, 1]. None stands for what the backbone's weights were trained with,
            which the command line fills in, and Lightning's trainer before the first batch; ImageNet's where there is no
            model.
        seed: of shuffling and augmentation.
        bit_depth: significant bits of 16-bit images; None infers them per dataset from its training images.
        mask_resize: nearest, or area, which keeps defects that are smaller than a pixel of `image_size`.
        max_megapixels: larger image files are refused.
        drop_last: leave out a last training batch that is not full, unless it is the only one. None stands for the
            method's recipe.
        repeat: how often an epoch goes over the training images. None stands for the method's recipe, which is 1 but for
            methods whose papers count otherwise.
        test_subset: full, or drop_last_32, what released code of some methods evaluates (see `datamodules.subset`). None
            is full, unless the protocol is as_released and the method's recipe says otherwise.
        setting: unified, one model for all categories, or per_category: the command line trains one model for each
            category in turn and puts their results into one record.
        cache_mb: without workers, keep up to this much of the resized images in memory.
        predict_root: folder (searched recursively, without the masks in ground_truth) or file for `predict_dataloader`, or
            a list of these.
        tiles: cut photographs into overlapping tiles, for photographs that are larger than a network's input. Each tile is
            resized to `image_size`. One trains on tiles, of which an epoch has as many draws, and splits, `shots` and
            `contamination` count photographs. Tested, predicted and compared with are whole photographs, one a batch: the
            tiles are scored `eval_batch_size` at a time, their maps stitched at the photograph's own size (see
            `datamodules.tiling`), and an image's score is the highest of its tiles'. None: each photograph is one image.
        predict_dataset: which of several `datasets` the images of `predict_root` are like, for models that keep
            statistics per dataset. None takes the one in whose folder they lie, if there is one.

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
        holdout: float | None = None,
        epoch_images: int | None = None,
        category_count: int | None = None,
        shots: int | None = None,
        contamination: float = 0.0,
        contamination_reserved: float | None = None,
        augmentation: str = "none",
        anomalies: AnomalyConfig | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        bit_depth: int | None = None,
        mask_resize: str = "nearest",
        max_megapixels: float = MAX_MEGAPIXELS,
        drop_last: bool | None = None,
        repeat: int | None = None,
        test_subset: str | None = None,
        setting: str = "unified",
        cache_mb: int = 256,
        predict_root: list[str] | str | None = None,
        predict_dataset: str | None = None,
        crop_from: int | tuple[int, int] | None = None,
        fold: tuple[int, int] | None = None,
        tiles: TileConfig | None = None,
    ) -> None:
        super().__init__()
        check_sampling(sampling)
        if holdout is not None and not 0 <= holdout < 1:
            raise DataError(f"holdout is a fraction of the normal training images, 0 <= holdout < 1, found {holdout}.")
        for name, value in (("epoch_images", epoch_images), ("category_count", category_count)):
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1 or null, found {value}.")
        training_set.check_options(shots, contamination, contamination_reserved)
        training_set.check_fold(fold, holdout)
        if bit_depth is not None and bit_depth not in BIT_DEPTHS:
            raise DataError(f"bit_depth must be one of {BIT_DEPTHS} or None, found {bit_depth}.")
        if eval_batch_size < 1 or (batch_size is not None and batch_size < 1):
            raise DataError(f"Batch sizes must be at least 1, found {batch_size} and {eval_batch_size}.")
        for name, value in (("num_workers", num_workers), ("cache_mb", cache_mb), ("seed", seed)):
            if value is not None and value < 0:
                raise DataError(f"{name} must be at least 0, found {value}.")
        if repeat is not None and repeat < 1:
            raise DataError(f"repeat must be at least 1, found {repeat}.")
        if max_megapixels <= 0:
            raise DataError(f"max_megapixels must be positive, found {max_megapixels}.")
        for name, chosen, known in (
            ("mask_resize", mask_resize, MASK_RESIZES),
            ("setting", setting, SETTINGS),
            ("augmentation", augmentation, policies.AUGMENTATIONS),
            ("test_subset", test_subset or FULL, TEST_SUBSETS),
        ):
            if chosen not in known:
                raise DataError(f"Unknown {name} {chosen!r}. {did_you_mean(chosen, known)}")
        if (mean is None) != (std is None):
            raise DataError(f"mean and std belong together: give both or neither, found mean={mean}, std={std}.")
        if std is not None and (len(mean) != 3 or len(std) != 3 or min(std) <= 0):
            raise DataError(f"mean and std are three numbers each, std positive; found mean={mean}, std={std}.")
        labels = Counter(config.label or config.name for config in datasets)
        twice = [label for label, count in labels.items() if count > 1]
        if twice:
            raise DataError(f"Two datasets are called {twice[0]!r}: give one of them a `label` of its own.")
        if predict_dataset is not None and predict_dataset not in labels:
            raise DataError(f"Unknown predict_dataset {predict_dataset!r}. {did_you_mean(predict_dataset, labels)}")
        if tiles is not None and crop_from is not None:
            raise DataError(
                "tiles and crop_from do not go together: tiles cover all of a photograph, a crop cuts its margin off. Leave "
                "one of them out."
            )
        if tiles is not None and mask_resize != "nearest":
            raise DataError(f"mask_resize={mask_resize}: with tiles masks keep their own size. Leave it out.")
        self.datasets = list(datasets)
        self.image_size: Any = image_size  # a pair from setup on
        self.resize = resize
        self.crop_from: Any = crop_from
        self.tiles = tiles
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.sampling = sampling
        self.holdout, self.fold = (0.0 if fold else holdout), fold
        self.epoch_images, self.category_count = epoch_images, category_count
        self.shots, self.contamination, self.contamination_reserved = shots, contamination, contamination_reserved
        self.augmentation = augmentation
        self.anomalies = anomalies
        self._normalisation_given = mean is not None
        self.mean, self.std = tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)
        self.seed = seed
        self.bit_depth = bit_depth
        self.mask_resize, self.max_megapixels = mask_resize, max_megapixels
        self.drop_last = bool(drop_last)
        self.repeat = 1 if repeat is None else repeat
        self.test_subset = test_subset or FULL
        self.setting = setting
        self.left_out: frozenset[int] = frozenset()
        self.cache_mb = cache_mb
        self.predict_root, self.predict_dataset = predict_root, predict_dataset
        self.table: SampleTable | None = None
        self.categories: list[str] = []
        self.fingerprint = ""
        self.fingerprints: dict[str, str] = {}
        self.bit_depths: dict[str, int] = {}
        self._reading: Reading | None = None
        self._rules: dict[str, Any] = {}
        self._remarks: list[str] | None = None
        self._unknown: list[Row] = []
        self._source: Any = None
        self._served: CachedSplits | None = None
        self._views: TrainingViews | None = None
        self._tile_rows: list[Row] = []
        self._tile_rows_of: dict[str, list[Row]] = {}

    # -- reading ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read the table and run the cheap part of `check` (names and headers, nothing decoded). Done once.

        Raises:
            DataError: a missing option, an unknown name, or data with errors.
        """
        if self._source is None:
            self._check_filled_in()
        if stage == "predict" and self.predict_root is not None:
            if self._source is None:
                self._unknown = unknown_rows(self.predict_root, self.predicted_dataset)
                depths = depth_of(self._unknown, self.bit_depth, self.max_megapixels)
                self._source = PhotographSource(
                    self.image_size,
                    self.resize,
                    depths,
                    max_megapixels=self.max_megapixels,
                    crop_from=self.crop_from,
                )
            return
        if self.table is not None:
            return
        configs = self.datasets if self.category_count is None else first_categories(self.datasets, self.category_count)
        found = read_datasets(configs, self.bit_depth, self.max_megapixels)
        self._reading = found
        table = training_set.few_shots(hold_out(found.table, self.holdout, self._holdouts()), self.shots, self.seed)
        table = training_set.leave_out(table, self.fold)
        table = training_set.contaminate(table, self.contamination, self.contamination_reserved, self.seed)
        self.categories = list(dict.fromkeys(category_keys(table)))
        if self.setting == "per_category" and len(self.categories) > 1:
            raise DataError(
                f"setting per_category is one model per category, but {len(self.categories)} are read here. `fit` trains "
                "them one after the other; for anything else name one category."
            )
        self.left_out = left_out(table, self.test_subset)
        self.fingerprint, self.fingerprints = found.fingerprint, found.fingerprints
        self.bit_depths = found.bit_depths
        self.table = table
        self._rules = {**found.rules, "mask_resize": self.mask_resize}
        if self.tiles is not None:
            rows = self._rows(*training_set.TRAINABLE)
            self._tile_rows = tile_rows(rows, [shown_size(row.image_path) for row in rows], self.tiles)
        self._source = self._image_source(0 if self._workers() else self.cache_mb * 2**20)

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
        if self.crop_from is not None:
            whole = (self.crop_from,) * 2 if isinstance(self.crop_from, int) else tuple(self.crop_from)
            if len(whole) != 2 or min(whole) < 1:
                raise DataError(f"crop_from is a positive side or (height, width), found {self.crop_from}.")
            check_crop(whole, size)
            self.crop_from = whole

    @property
    def resizing(self) -> str:
        """How an image gets its size, in words: the resize rule, and the tiles or the crop if there are any."""
        if self.tiles is not None:
            return f"{self.resize}, {self.tiles}"
        if self.crop_from is None:
            return self.resize
        height, width = self.crop_from
        return f"{self.resize} to {height}x{width}, centre crop"

    def _image_source(self, cache_bytes: int = 0) -> ImageSource:
        return ImageSource(
            self.image_size,
            self.resize,
            **self._rules,
            max_megapixels=self.max_megapixels,
            cache_bytes=cache_bytes,
            crop_from=self.crop_from,
        )

    def remarks(self) -> list[str]:
        """What the numbers of a run on this data must be read with, in sentences for output and record.

        Raises:
            DataError: test photographs that cannot be scored in tiles, which nothing reads before the test.
        """
        if self._remarks is None:
            self._remarks = training_set.describe(
                self.table, self.shots, self.contamination, self.contamination_reserved
            )
            self._remarks += held_out(self.table, self.holdout, self._holdouts())
            self._remarks += tested_and_trained(self._rows("train", "val"), self._rows("test"), self._reading.hashes)
            read = self._source.mask if self._served is None else lambda row: self._served.cache.mask(row.id)
            if self.tiles is not None:
                check_photographs(self._rows("test"), self.tiles)
                self._remarks.append(self._describe_tiles())
            elif self.crop_from is None:
                self._remarks += vanishing_masks(self._rows("test"), read, self._rules["thresholds"], self.image_size)
            else:
                whole = self._image_source().whole_mask
                self._remarks += cropped_masks(self._rows("test"), whole, self.crop_from, self.image_size)
            if self.mask_resize != "nearest":
                self._remarks.append(f"masks are resized by {self.mask_resize}")
            if self._short_batch():
                count = number_of(self.epoch_images or self.training_samples, "training image")
                self._remarks.append(
                    f"{count} make no full batch of {self.batch_size} per process: the short one is kept"
                )
        return self._remarks

    def changed_since(self, moment: float) -> list[str]:
        """What to say of files that changed while they were in use, in one sentence; [] if all are as they were.

        moment: seconds since the epoch, before the files were first read. Only files with another size or time than then
        are read again.
        """
        try:
            now = fingerprint(self._reading.table, self._reading.roots)  # as split on disk, before any is held out
        except OSError as error:
            return [f"DATA CHANGED DURING THE RUN: {error.filename} can no longer be read ({error.strerror})"]
        if now == self.fingerprint:
            return []
        rows = self._rows(*training_set.TRAINABLE, "test")
        files = dict.fromkeys(path for row in rows for path in (row.image_path, *row.mask_paths))
        touched = [path for path in files if os.stat(path).st_ctime > moment]
        named = f": {', '.join(touched[:3])}{' ...' if len(touched) > 3 else ''}" if touched else ""
        return [
            f"DATA CHANGED DURING THE RUN: the images and masks are not those that the training began with "
            f"(fingerprint {self.fingerprint[:12]} then, {now[:12]} at its end){named}"
        ]

    def _holdouts(self) -> dict[str, float]:
        """Dataset -> the share of its normal training images that is held out by default."""
        return {name: reader.holdout for name, reader in self._reading.readers.items()}

    def _short_batch(self) -> bool:
        """Whether dropping the last batch would leave a process without any."""
        draws = self.repeat * (self.epoch_images or self.training_samples)
        return self.drop_last and draws <= (self.batch_size - 1) * self._place()[0]

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise pixels so from now on, unless the constructor was given a mean and a std."""
        if not self._normalisation_given:
            self.mean, self.std = tuple(mean), tuple(std)

    def view_training_images(self, views: TrainingViews) -> None:
        """From now on training batches also carry what `views` makes of each drawn image.

        Raises:
            DataError: synthetic anomalies are asked for, which would be in those images too.
        """
        if self.anomalies is not None:
            raise DataError(
                "data.init_args.anomalies: this method makes its own training images of normal ones. Leave it out."
            )
        self._views = views

    def provenance(self) -> list[dict[str, Any]]:
        """Per dataset: name, fingerprint, categories, and shots and contamination if set, for the run record."""
        options = {"shots": self.shots, "contamination": self.contamination or None}
        options["contamination_reserved"] = self.contamination_reserved
        return [
            {
                "name": str(name),
                "fingerprint": self.fingerprints[str(name)],
                "categories": list(dict.fromkeys(rows["category"])),
                **{option: value for option, value in options.items() if value is not None},
            }
            for name, rows in self.table.groupby("dataset", sort=False)
        ]

    def fpr_limits(self) -> tuple[float, ...]:
        """False-positive rates up to which AU-PRO is integrated: those of every dataset's reader, ascending."""
        return tuple(sorted({limit for reader in self._reading.readers.values() for limit in reader.fpr_limits}))

    @property
    def segmentation(self) -> bool:
        """Whether one of the datasets is also measured by SegF1."""
        return any(reader.segmentation for reader in self._reading.readers.values())

    def conditions(self) -> dict[int, str]:
        """Id -> `name=value`, for the test images whose reader knows under what they were taken."""
        found = {row.id: self._reading.readers[row.dataset].condition(row.image_path) for row in self._rows("test")}
        return {number: condition for number, condition in found.items() if condition}

    def dataset_of(self) -> dict[str, str]:
        """Category key -> dataset, in table order."""
        return dict(zip(category_keys(self.table), self.table["dataset"], strict=True))

    # -- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Training images, or tiles, in the order of the own seeded sampler."""
        rows = self._samples("train")
        dataset = self._dataset(rows, self._augmentation(), self._anomalies(), self._views)
        sampler = TrainSampler(
            dataset,
            [row.dataset for row in rows],
            [row.category for row in rows],
            self.sampling,
            self.seed,
            *self._place(),
            draws=self.epoch_images,
            repeat=self.repeat,
        )
        return self._loader(dataset, sampler, self.batch_size, self.drop_last and not self._short_batch())

    def train_images(self) -> DataLoader:
        """Every training image, or tile, exactly once over all processes, in table order and without augmentation."""
        return self._eval_loader(self._samples("train"))

    @property
    def training_samples(self) -> int:
        """Number of training images, or of their tiles."""
        if self.tiles is not None:
            return len(self._samples("train"))
        return int((self.table["split"] == "train").sum())

    @property
    def normal_split(self) -> str:
        """val if normal images are held out of any category, else train."""
        return "val" if (self.table["split"] == "val").any() else "train"

    def normal_images(self) -> DataLoader:
        """Normal images to compare scores with, each once over all processes; of each category at most `NORMAL`.

        They are the held-out ones; where those of a category are fewer than `FEWEST_HELD_OUT`, also its training images. With
        `fold` they are those that it leaves out.
        """
        return self._whole_loader(self._normal_rows())

    def _normal_rows(self) -> list[Row]:
        if self.fold is not None:
            return self._rows(training_set.FOLD)
        found: dict[str, dict[str, list[Row]]] = {}
        for split in ("val", "train"):
            for row in self._rows(split):
                found.setdefault(row.category, {"val": [], "train": []})[split].append(row)
        chosen = []
        for parts in found.values():
            chosen += _evenly(parts["val"], NORMAL["val"])
            if len(parts["val"]) < FEWEST_HELD_OUT:
                chosen += _evenly(parts["train"], NORMAL["train"])
        return sorted(chosen, key=lambda row: row.id)

    def val_dataloader(self) -> DataLoader | list:
        """Held-out normal images, or their tiles; an empty list if nothing is held out."""
        rows = self._samples("val")
        return self._eval_loader(rows, repeat=True) if rows else []

    def test_dataloader(self) -> DataLoader:
        """Every test image once over all processes (see `EvalSampler`); of data without any, the `normal_images`.

        The latter measure nothing, but give a run that only predicts its scale.
        """
        return self._whole_loader(self._test_rows() or self._normal_rows(), repeat=True)

    @property
    def has_test_images(self) -> bool:
        """Whether anything can be measured."""
        return bool(self._test_rows())

    def test_images(self) -> dict[str, int]:
        """Category key -> how many images `test_dataloader` gives, over all processes."""
        return dict(Counter(row.category for row in self._test_rows() or self._normal_rows()))

    def scored_pixels(self, rows: Sequence[Row] | None = None) -> int:
        """Pixels of images at the size at which they are scored, without a head's `map_size`; None for those of the test.

        A file that cannot be read has none.
        """
        rows = self._test_rows() if rows is None else rows
        height, width = self.image_size
        if self.tiles is None:
            return height * width * len(rows)
        pixels = 0
        for row in rows:
            with contextlib.suppress(DataError):
                pixels += math.prod(shown_size(row.image_path))
        return pixels

    def _test_rows(self) -> list[Row]:
        return [row for row in self._rows("test") if row.id not in self.left_out]

    def image_batch(self, ids: Sequence[int]) -> Batch:
        """One batch of chosen images, by id, read from disk whether or not features are cached.

        Raises:
            DataError: photographs are cut into tiles, and none is an image by itself.
        """
        if self.tiles is not None:
            raise DataError(
                f"Photographs are cut into {self.tiles}: there is no image of one at the network's size, which is needed here. "
                "Use a run without tiles."
            )
        dataset = self._dataset(self._chosen(ids))
        return collate([dataset[position] for position in range(len(dataset))])

    def scored_batches(self, ids: Sequence[int]) -> Iterator[Batch]:
        """Chosen images, by id, as the test scores them, from disk: one batch of all, or of each photograph with tiles."""
        if self.tiles is None:
            yield self.image_batch(ids)
            return
        dataset = self._whole(self._chosen(ids))
        for position in range(len(dataset)):
            yield collate([dataset[position]])

    def predict_dataloader(self) -> DataLoader:
        """Images under `predict_root`: label -1, anomaly_type "unknown", category "", no masks."""
        if self.predict_root is None:
            raise DataError("Nothing to predict on: give the data option predict_root, a folder of images or a file.")
        return self._whole_loader(self._unknown or unknown_rows(self.predict_root, self.predicted_dataset), repeat=True)

    @property
    def photographs(self) -> PhotographSource:
        """Where the images of `predict_root` come from, after `setup("predict")`."""
        if not isinstance(self._source, PhotographSource):
            raise DataError(
                'Call setup("predict") before asking for photographs; the data option predict_root names them.'
            )
        return self._source

    @property
    def predicted_dataset(self) -> str:
        """Which of several datasets the images of `predict_root` are like; "" if that is not known, or there is one."""
        if len(self.datasets) <= 1 or self.predict_root is None:
            return ""
        given = [self.predict_root] if isinstance(self.predict_root, str) else self.predict_root
        places = [os.path.realpath(os.path.expanduser(place)) for place in given]
        roots = {d.label or d.name: os.path.realpath(os.path.expanduser(d.root)) for d in self.datasets if d.root}
        around = [name for name, root in roots.items() if os.path.commonpath([root, *places]) == root]
        # Of folders inside each other the inner one is meant.
        return self.predict_dataset or max(around, key=lambda name: len(roots[name]), default="")

    # -- cached features -------------------------------------------------------------------------------------------

    def symmetric_rows(self) -> list[Row] | None:
        """Training images as the augmentation flips and turns them; None if they are changed in more ways than that.

        Raises:
            DataError: images would be turned by 90 degrees that are not square.
        """
        if self.anomalies is not None:
            return None
        # Those of held-out and unused images too, as they are on disk: an entry then serves any holdout, shots and fold.
        ids = {row.id for row in self._rows(*training_set.TRAINABLE)}
        rows = self._tile_rows or [row for row in table_rows(self._reading.table, *SPLITS) if row.id in ids]
        return symmetric_rows(rows, self._augmentation(), self.image_size)

    def cached_rows(self) -> list[Row]:
        """What a cache keeps: the table's images as they are on disk; of photographs in tiles all that may be trained on."""
        return self._tile_rows or table_rows(self._reading.table, *SPLITS)

    def all_images(self, first: int, batch_size: int, symmetric: Sequence[Row] = ()) -> DataLoader:
        """Every image that is cached in the order of ids, then `symmetric`, each with its uint8 `pixels` (3, H, W).

        `first` of them are left out.
        """
        rows = [*self.cached_rows(), *symmetric][first:]
        # Every image is read once, but for symmetries: those of one image follow each other.
        dataset = TableDataset(rows, LastImage(self._image_source()), self.mean, self.std, pixels=True)
        return image_loader(dataset, None, batch_size, self._workers())

    def content(self) -> str:
        """Hash of all images and masks in the order of their ids, for the key of a cache; see `content_hash`.

        With tiles also of which photographs may be trained on: no others are in `cached_rows`.
        """
        cut = [row.id for row in self._rows(*training_set.TRAINABLE)] if self.tiles is not None else []
        return content_hash(self._reading.table, self._reading.roots, self._rules | ({"cut": cut} if cut else {}))

    def serve_images_from(self, cache: FeatureCache) -> None:
        """From now on images and masks of the table are read, decoded and resized, from an entry that holds them."""
        self._source = CachedImages(cache, self._source)

    def serve_from(
        self, cache: FeatureCache, device: torch.device, resident_bytes: int, symmetric: Sequence[Row] = ()
    ) -> None:
        """From now on training, validation and test batches carry `features` from the cache instead of images.

        Args:
            cache: An entry for this table.
            device: Where training happens; splits are copied there once, as long as they fit.
            resident_bytes: How much may be copied; what does not fit is read from disk batch by batch.
            symmetric: The rows of the entry that follow those of the table.
        """
        trained = {row.id for row in self._samples("train")}
        places = enumerate(symmetric, len(self.cached_rows()))
        turned = {(row.id, row.symmetry): place for place, row in places if row.id in trained}
        self._served = CachedSplits(cache, device, resident_bytes, turned, self._augmentation())

    # -- batches ---------------------------------------------------------------------------------------------------

    def _rows(self, *splits: str) -> list[Row]:
        if self.table is None:
            raise DataError("Call setup() before asking for batches.")
        return table_rows(self.table, *splits)

    def _chosen(self, ids: Sequence[int]) -> list[Row]:
        """Rows of images that are trained on, left out or tested, by id."""
        rows = {row.id: row for row in self._rows(*training_set.TRAINABLE, "test")}
        return [rows[i] for i in ids]

    def _samples(self, split: str) -> list[Row]:
        """What stands for the images of a split that is trained on or held out: they themselves, or their tiles."""
        if self.tiles is None:
            return self._rows(split)
        if split not in self._tile_rows_of:
            photographs = {(row.dataset, row.image_path) for row in self._rows(split)}
            tiles = [row for row in self._tile_rows if (row.dataset, row.image_path) in photographs]
            self._tile_rows_of[split] = tiles
        return self._tile_rows_of[split]

    def _describe_tiles(self) -> str:
        photographs = len(self._rows("train"))
        return (
            f"{self.tiles} at {self.image_size[1]} x {self.image_size[0]} pixels: {number_of(photographs, 'training image')} "
            f"make {number_of(self.training_samples, 'tile')}; maps are stitched and measured at each photograph's own size, an "
            "image's score is the highest of its tiles'"
        )

    def _augmentation(self) -> Augmentation | None:
        if self.augmentation == "none":
            return None
        return Augmentation(
            self.augmentation, dict(zip(category_keys(self.table), self.table["category"], strict=True))
        )

    def _anomalies(self) -> Anomalies | None:
        if self.anomalies is None:
            return None
        return Anomalies(self.anomalies, self._samples("train"), self._source.load)

    def describe_anomalies(self) -> str:
        """What anomalies training images get, in words for the run's record."""
        return self._anomalies().describe() if self.anomalies is not None else ""

    def _dataset(
        self,
        rows: Sequence[Row],
        augmentation: Augmentation | None = None,
        anomalies: Anomalies | None = None,
        views: TrainingViews | None = None,
    ) -> TableDataset:
        return TableDataset(rows, self._source, self.mean, self.std, augmentation, anomalies, views=views)

    def _eval_loader(self, rows: Sequence[Row], repeat: bool = False) -> DataLoader:
        dataset = self._dataset(rows)
        return self._loader(dataset, EvalSampler(dataset, *self._place(), repeat), self.eval_batch_size)

    def _whole(self, rows: Sequence[Row]) -> PhotographDataset:
        """Whole photographs with what cuts them."""
        source = getattr(self._source, "source", self._source)  # a cache keeps tiles alone
        return PhotographDataset(rows, source, self.mean, self.std, self.tiles, self.eval_batch_size)

    def _whole_loader(self, rows: Sequence[Row], repeat: bool = False) -> DataLoader:
        """Loader over images that are scored: as `_eval_loader`, or one photograph a batch with what cuts it into tiles."""
        if self.tiles is None:
            return self._eval_loader(rows, repeat)
        dataset = self._whole(rows)
        return image_loader(dataset, EvalSampler(dataset, *self._place(), repeat), 1, self._workers())

    def _loader(
        self, dataset: TableDataset, sampler: DistributedSampler, batch_size: int, drop_last: bool = False
    ) -> DataLoader:
        if self._served is not None and dataset.rows[0].label != UNKNOWN:
            # On a CPU a batch is one copy of a millisecond.
            workers = 0 if self._served.device.type == "cpu" else self._workers()
            return cached_loader(self._served.batches(dataset), sampler, batch_size, drop_last, workers)
        return image_loader(dataset, sampler, batch_size, self._workers(), drop_last)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return 0 if self.table is None else usual_workers(self.training_samples)

    def _place(self) -> tuple[int, int]:
        """(number of processes, rank of this one)."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0


def _evenly(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of the rows, from all places."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]
