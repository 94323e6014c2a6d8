"""`python -m lightning_modules submission`: what MVTec AD 2's evaluation server takes, from a trained run.

Its private test sets have no labels. The server wants, for every image of `test_private` and `test_private_mixed`, an
anomaly map as a float16 TIFF, and may have a thresholded one as a PNG of 0 and 255, both of the image's size:

    OUT/anomaly_images/<category>/<test_private|test_private_mixed>/<stem>.tiff
    OUT/anomaly_images_thresholded/<category>/<test_private|test_private_mixed>/<stem>.png

The threshold is the authors' baseline: per category mean + 3 standard deviations of all pixels of the validation images'
maps, which are normal and held out. Maps are written in units of this threshold, so that float16 neither overflows nor loses
small values; 1 is then the threshold everywhere. Check and pack the folder with the authors' own script before the upload.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.errors import DataError
from datamodules.images import read_header
from datamodules.problems import number_of
from datamodules.readers import find_dataset
from datamodules.readers.mvtec_ad_2 import PRIVATE, MVTecAD2
from datamodules.tree import list_images
from lightning_modules.base import ReconstructionModule
from lightning_modules.prediction.geometry import to_photograph
from lightning_modules.running import recorded_configuration
from lightning_modules.running.command_line import UniReconCLI
from lightning_modules.running.filling import with_environment
from lightning_modules.running.finding import find_run
from models.head import ScoredMaps

CATEGORIES = ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts")
MAPS, THRESHOLDED = "anomaly_images", "anomaly_images_thresholded"
DEVIATIONS = 3
# In the order of their names the validation images come first: what follows needs their threshold.
_NORMAL, _UNKNOWN = "0_validation", "1_test"


class Submission(L.Callback):
    """Writes the two files of each private image; `written` counts the images.

    Args:
        out: Where they go.
        links: The folder of links whose images are predicted, see `link`.
        crop: (height, width) before and after the run's centre crop; None without one.
    """

    def __init__(self, out: Path, links: Path, crop: tuple[tuple[int, int], tuple[int, int]] | None) -> None:
        self.out, self.links, self.crop = out, links, crop
        self.written = 0
        self._sums: dict[str, np.ndarray] = {}  # category -> number, sum and sum of squares of the pixels

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        module: ReconstructionModule,
        outputs: ScoredMaps,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        maps = outputs.maps.float().cpu().numpy()
        for one, path, error in zip(maps, batch["path"], batch["error"], strict=True):
            if error:
                raise DataError(error.replace(path, os.path.realpath(path)))  # the links are gone when people read it
            part, category, *place = Path(path).relative_to(self.links).parts
            if part == _NORMAL:
                pixels = one.astype(np.float64)
                found = np.array([pixels.size, pixels.sum(), np.square(pixels).sum()])
                self._sums[category] = self._sums.get(category, 0) + found
                continue
            self._write(one / self.threshold(category), Path(category, *place), path)

    def threshold(self, category: str) -> float:
        """Mean + 3 standard deviations of the pixels of a category's validation maps.

        Raises:
            DataError: these maps are 0 everywhere, or hold what is not a number.
        """
        number, total, squares = self._sums[category]
        mean = total / number
        value = float(mean + DEVIATIONS * np.sqrt(max(0.0, squares / number - mean**2)))
        if not 0 < value < float("inf"):
            raise DataError(f"{category}: the maps of its validation images are {value:g}: was the run trained?")
        return value

    def _write(self, values: np.ndarray, place: Path, image: str) -> None:
        header = read_header(image)
        whole = to_photograph(values, (header.height, header.width), self.crop).clip(0, np.finfo(np.float16).max)
        tiff, png = (
            self.out / folder / place.with_suffix(suffix) for folder, suffix in ((MAPS, ".tiff"), (THRESHOLDED, ".png"))
        )
        for file in (tiff, png):
            file.parent.mkdir(parents=True, exist_ok=True)
        rounded = whole.astype(np.float16)
        tiff.write_bytes(tiff_bytes(rounded))
        cv2.imwrite(str(png), (rounded > 1).astype(np.uint8) * 255)
        self.written += 1


def tiff_bytes(values: np.ndarray) -> bytes:
    """An uncompressed little-endian TIFF of one float16 channel (H, W); neither Pillow nor OpenCV writes these."""
    height, width = values.shape
    data = np.ascontiguousarray(values, dtype="<f2").tobytes()
    short, long = 3, 4
    tags = [
        (256, long, width),
        (257, long, height),
        (258, short, 16),  # bits per sample
        (259, short, 1),  # no compression
        (262, short, 1),  # black is zero
        (273, long, 8),  # where the only strip begins
        (277, short, 1),  # samples per pixel
        (278, long, height),  # rows of the strip
        (279, long, len(data)),
        (339, short, 3),  # IEEE floating point
    ]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    padding = b"\0" * (len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(padding)) + data + padding + directory + bytes(4)


def link(root: Path, categories: Iterable[str], links: Path) -> int:
    """Makes links to the validation and private images of some categories; returns how many are private.

    Raises:
        DataError: a category has no such images, or two of one name but for the suffix.
    """
    private = 0
    for category in categories:
        folder = MVTecAD2().folder(root, category)
        sources = {links / _NORMAL / category: folder / "validation" / "good"}
        sources |= {links / _UNKNOWN / category / name: folder / name for name in PRIVATE}
        for place, source in sources.items():
            images = list_images(source)
            if not images:
                raise DataError(f"{source} holds no image, and a submission needs them: unpack the whole data set.")
            stems = [image.stem for image in images]
            if same := [image.name for image in images if stems.count(image.stem) > 1]:
                raise DataError(
                    f"{source} holds {' and '.join(same[:4])}: their files for the server would have one name. Delete or "
                    "rename all but one of each."
                )
            place.mkdir(parents=True)
            for image in images:
                (place / image.name).symlink_to(image.resolve())
            private += len(images) if source.name in PRIVATE else 0
    return private


class SubmissionCLI(UniReconCLI):
    """`predict` over links, with the server's files in place of heat maps."""

    def __init__(self, args: list[str], out: Path, links: Path) -> None:
        self.out, self.links = out, links
        super().__init__(args)

    def _callbacks(self) -> list[L.Callback]:
        data = self.datamodule
        data.setup("predict")
        crop = None if data.crop_from is None else (data.crop_from, data.image_size)
        self.submission = Submission(self.out, self.links, crop)
        return [self.submission]

    def after_predict(self) -> None:
        """Nothing is left to say: an image that cannot be read has ended the command."""


def main(arguments: list[str], methods: Iterable[type]) -> None:
    """Parses the command's own options; everything else is an option of `predict`."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules submission", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--run", required=True, help="name or record folder of a run on mvtec_ad_2")
    parser.add_argument("--out", required=True, help="folder for the files; runs of single categories share one")
    parser.add_argument("--data-root", help="by default where the run read the data")
    options, more = parser.parse_known_args(arguments)
    config, out = find_run(options.run) / "config.yaml", Path(options.out)
    named = _dataset(config)
    root = options.data_root or named.get("root") or ""
    _, root, _, chosen = find_dataset(MVTecAD2.name, root, named.get("categories"))
    for folder in (out / kind / category for kind in (MAPS, THRESHOLDED) for category in chosen):
        if folder.exists():
            raise SystemExit(f"{folder} is there already: delete it or name another --out, so that no files mix.")
    if set(chosen) != set(CATEGORIES):
        rank_zero_info(f"Note: the server wants all {len(CATEGORIES)} categories, these are {', '.join(chosen)}.")
    with tempfile.TemporaryDirectory() as place:
        links = Path(place)
        private = link(root, chosen, links)
        words = ["predict", f"--config={config}", f"--data.init_args.predict_root={links}", "--trainer.devices=1"]
        words = with_environment(recorded_configuration.as_data([*words, *more], methods), os.environ)
        command = SubmissionCLI(words, out, links)
        if command.submission.written != private:
            raise SystemExit(f"error: {command.submission.written} of {private} images were written to {out}.")
    rank_zero_info(f"{number_of(private, 'image')} of {number_of(len(chosen), 'category')} for the server: {out}")


def _dataset(config: Path) -> dict[str, Any]:
    """The entry of MVTec AD 2 in a run's configuration."""
    content = yaml.safe_load(config.read_text())
    entries = content["data"]["init_args"]["datasets"]
    found = [entry for entry in entries if entry.get("name") == MVTecAD2.name]
    if len(entries) != 1 or not found:
        names = ", ".join(str(entry.get("name")) for entry in entries)
        raise SystemExit(
            f"The run of {config.parent} was trained on {names}; a submission is of {MVTecAD2.name} alone."
        )
    return found[0]
