"""The files of a prediction."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.problems import number_of
from lightning_modules.base import ReconstructionModule
from lightning_modules.decisions import CANNOT_TELL, DEFECT, GOOD, Choice, Decider, Decision, describe, with_features
from lightning_modules.metrics.sync import Group
from lightning_modules.prediction import geometry, page, place
from lightning_modules.prediction.regions import Region, annotation, find_regions
from lightning_modules.running import refusals
from models.head import ScoredMaps
from results.common.shown import printable

LONGEST = 200
"""Bytes of an image's name that its files' names take over; file systems allow 255 in all."""
KEPT = 2**29
"""Bytes of photographs that wait for their pictures in memory; others are read again."""
MOST_THREADS = 4
"""That draw; a photograph of 12 megapixels takes each about 400 MB, so that more cores shall not mean more memory."""
SMALL = "small"
"""The folder of the page's pictures while they are made."""
NO_NORMAL = (
    "the run's record keeps no scores of normal images; `python -m lightning_modules test --config <record>/config.yaml "
    "--run.overwrite=true` makes them"
)


@dataclass(frozen=True)
class Photograph:
    """What is known of a photograph.

    Args:
        number: Its place in the order of the images.
        path: Its file.
        decision: What is said of it.
        size: (height, width) in pixels; (0, 0) if it could not be read.
        regions: Of its map, above the pixel threshold.
        failure: Why it could not be read; else "".
        name: What its files' names begin with.
        scale: Ends of the colours of its map.
    """

    number: int
    path: str
    decision: Decision
    size: tuple[int, int] = (0, 0)
    regions: tuple[Region, ...] = ()
    failure: str = ""
    name: str = ""
    scale: tuple[float, float] | None = None

    @property
    def severity(self) -> tuple[float, ...]:
        """Sorts photographs, the worst first: defects, then those that cannot be told, each by the excess over its threshold.

        The excess is a share of the threshold, so that categories of different scores stand in one order.
        """
        one = self.decision
        value = one.threshold.value if one.threshold else 0.0
        excess = (one.score - value) / abs(value) if value else one.score
        return (
            (DEFECT, CANNOT_TELL, GOOD).index(one.verdict),
            not self.failure,
            -excess if math.isfinite(excess) else 0.0,
            self.number,
        )


class Predictions(L.Callback):
    """Writes what `predict` finds of photographs, in files for people and for programs.

    `scores.csv` has a row for each, `predictions.json` its regions as COCO annotations, `predictions.html` all on one page.
    Beside them lie a picture (`.jpg`) at its own size and the raw float32 map (`.npy`) of each. A photograph that could not
    be read is a row with a reason. The files of an earlier prediction stay until all of these are written.

    Args:
        folder: Where the files go.
        source: What is predicted, and with what.
        decider: Tells good from defect; None where the run's record keeps no normal images.
        scale: Ends of the colours where the decider knows none; None takes median and maximum of the first batch.

    Attributes:
        failed: Photographs that could not be read, as lines for people; after the prediction.
    """

    def __init__(
        self,
        folder: Path,
        source: place.Source,
        decider: Decider | None,
        scale: tuple[float, float] | None = None,
    ) -> None:
        self.folder, self.source, self.decider, self.scale = folder, source, decider, scale
        self.failed: list[str] = []
        self._new = folder.with_name(f"{folder.name}.new")
        self._found: list[Photograph] = []
        self._drawing: deque[Future[Photograph]] = deque()
        self._threads = min(MOST_THREADS, os.cpu_count() or 1)

    def on_predict_start(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        if trainer.is_global_zero:  # a broken-off prediction's files would mix with these
            shutil.rmtree(self._new, ignore_errors=True)
            (self._new / SMALL).mkdir(parents=True)
            rows = trainer.datamodule.predict_dataloader().dataset.rows
            pixels = trainer.datamodule.scored_pixels(rows)
            # A pixel of a raw map has four bytes; pictures are about as large as the photographs, which are there already.
            refusals.room(self._new, 4 * pixels, f"maps of {number_of(len(rows), 'image')}")
        trainer.strategy.barrier()
        trainer.datamodule.photographs.room = KEPT
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="drawing")
        self._started = time.perf_counter()

    def on_predict_batch_start(
        self, trainer: L.Trainer, module: ReconstructionModule, batch: dict[str, Any], *_: Any
    ) -> None:
        if self._compares:  # the step then does not compute them again
            batch.update(with_features(module, batch))

    @property
    def _compares(self) -> bool:
        """Whether the category of a photograph may have to be found by its features."""
        return self.decider is not None and not self.decider.given and len(self.decider.names) > 1

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
        scores = outputs.image_scores.tolist()
        seen = describe(module, batch) if self._compares else [None] * len(scores)
        read = [n for n, error in enumerate(batch["error"]) if not error]
        if read and module.has_map:
            self.scale = self.scale or (float(np.median(maps[read])), float(maps[read].max()))
        data = trainer.datamodule
        for n, (path, error) in enumerate(zip(batch["path"], batch["error"], strict=True)):
            number, kept = int(batch["id"][n]), data.photographs.take(path)
            if error:
                decision = self._decide(math.nan, Choice("", ""))
                self._found.append(Photograph(number, path, decision, failure=error))
                continue
            decision = self._decide(scores[n], self._choose(path, seen[n]), float(maps[n].max()))
            one = maps[n] if module.has_map else None
            self._wait(2 * self._threads)
            self._drawing.append(
                self._pool.submit(self._draw, data, number, path, batch["dataset"][n], kept, one, decision)
            )

    def _choose(self, path: str, descriptor: np.ndarray | None) -> Choice:
        return Choice("", "") if self.decider is None else self.decider.choose(path, descriptor)

    def _decide(self, score: float, choice: Choice, highest: float | None = None) -> Decision:
        if self.decider is not None:
            return self.decider.decide(score, choice, highest)
        return Decision(CANNOT_TELL, "", "", score, math.nan, None, None, "", NO_NORMAL)

    def _wait(self, at_most: int) -> None:
        """Takes what is drawn until no more than so many photographs are left to draw."""
        while len(self._drawing) > at_most or (self._drawing and self._drawing[0].done()):
            self._found.append(self._drawing.popleft().result())

    def _draw(
        self,
        data: Any,
        number: int,
        path: str,
        dataset: str,
        photo: np.ndarray | None,
        values: np.ndarray | None,
        decision: Decision,
    ) -> Photograph:
        """Writes the files of one photograph, in a thread."""
        from lightning_modules.prediction import drawing

        photo = data.photographs.read(path, dataset) if photo is None else photo
        size = photo.shape[:2]
        if values is None:
            return Photograph(number, path, decision, size)
        name = f"{number:06d}-{os.fsdecode(os.fsencode(Path(path).stem)[:LONGEST])}"
        np.save(self._new / f"{name}.npy", values)
        crop = None if data.crop_from is None else (data.crop_from, data.image_size)
        whole = geometry.to_photograph(values, size, crop)
        found = decision.pixel_threshold
        limit = math.inf if found is None else found.value
        scale = (self.decider and self.decider.colour_scale(decision.category)) or self.scale
        seen = None if crop is None else geometry.seen_part(size, crop)
        above = whole > limit
        words = f"{decision.verdict}   score {decision.score:.4g}" + (
            f" (defect above {decision.threshold.value:.4g})   p = {decision.p_value:.2g}   {printable(decision.category)}"
            if decision.threshold
            else ""
        )
        ends = [(0.0, f"{scale[0]:.3g}"), (1.0, f"{scale[1]:.3g}")]
        if scale[0] < limit < scale[1]:
            ends.insert(1, ((limit - scale[0]) / (scale[1] - scale[0]), f"outlined above {limit:.3g}"))
        drawing.sheet(drawing.panels(photo, whole, above, scale, seen), decision.verdict, words, ends).save(
            self._new / f"{name}.jpg", quality=90
        )
        for panel, picture in enumerate(drawing.small_panels(photo, whole, above, scale, seen)):
            drawing.write(picture, self._new / SMALL / f"{number:06d}-{panel}.jpg")
        regions = find_regions(whole, limit) if above.any() else ()
        return Photograph(number, path, decision, size, tuple(regions), "", name, scale)

    def on_exception(self, trainer: L.Trainer, module: ReconstructionModule, exception: BaseException) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown(cancel_futures=True)

    def on_predict_end(self, trainer: L.Trainer, module: ReconstructionModule) -> None:
        self._wait(0)
        self._pool.shutdown()
        parts = Group().gather_objects(self._found)
        found = {one.number: one for part in parts for one in part}  # the last ones of a process may be repeated
        photographs = [found[number] for number in sorted(found)]
        self.failed = [printable(one.failure) for one in photographs if one.failure]
        seconds = time.perf_counter() - self._started
        said = self._summary(photographs)
        if trainer.is_global_zero:
            table(photographs).to_csv(self._new / place.TABLE, index=False, errors="surrogateescape")
            coco = _coco(photographs, self.source.as_info())
            (self._new / place.COCO).write_text(json.dumps(coco), encoding="utf-8")
            self._write_page(photographs, said)
            shutil.rmtree(self._new / SMALL)
            place.replace(self._new, self.folder)
        what = "decisions, pictures and raw maps" if module.has_map else "decisions (the method has no map)"
        rank_zero_info(
            "\n".join(
                [
                    *said,
                    f"{number_of(len(photographs), 'image')}, {len(photographs) / seconds:.1f} a second: {what} are in "
                    f"{self.folder}",
                    f"The page to send on: {self.folder / place.PAGE}",
                ]
            )
        )

    def _summary(self, photographs: list[Photograph]) -> list[str]:
        """How many are what, and by which thresholds, in sentences."""
        verdicts = [one.decision.verdict for one in photographs]
        counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (DEFECT, CANNOT_TELL, GOOD))
        if self.decider is None:
            return [f"{counted}.", f"{NO_NORMAL[0].upper()}{NO_NORMAL[1:]}."]
        shown = [name for name in self.decider.names if any(one.decision.category == name for one in photographs)]
        lines = self.decider.sentences(shown)
        guessed = sum(one.decision.by == "nearest" for one in photographs)
        if guessed:
            lines.append(f"Category chosen by the nearest normal features: {number_of(guessed, 'image')}.")
        return [f"{counted}.", *lines]

    def _write_page(self, photographs: list[Photograph], said: list[str]) -> None:
        worst_first = sorted(photographs, key=lambda one: one.severity)
        root = _common([one.path for one in photographs])
        shown = [_shown(one, root, self._new / SMALL) for one in worst_first]
        title = f"{number_of(len(shown), 'photograph')}, checked by {Path(self.source.run).name}"
        lead = [f"Photographs in {root}."] * bool(root) + said[1:]
        text = page.page(title, lead, shown, str(self.folder))
        (self._new / place.PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")


def table(photographs: list[Photograph]) -> pd.DataFrame:
    """The content of `scores.csv`: one row per photograph.

    Columns: `image`, `category`, `category_by`, `decision`, `reason`, `image_score`, `threshold`, `p_value`, `width` and
    `height` in pixels, `area` (of all regions, pixels) and `regions`, a JSON list of [left, top, width, height, area, peak].
    """
    rows = []
    for one in photographs:
        decision, known = one.decision, bool(one.size[0])
        rows.append(
            {
                "image": one.path,
                "category": decision.category,
                "category_by": decision.by,
                "decision": decision.verdict,
                "reason": one.failure or decision.reason,
                "image_score": decision.score,
                "threshold": decision.threshold.value if decision.threshold else math.nan,
                "p_value": decision.p_value if known else math.nan,
                "width": one.size[1] if known else pd.NA,
                "height": one.size[0] if known else pd.NA,
                "area": sum(region.area for region in one.regions) if known else pd.NA,
                "regions": json.dumps([_numbers(region) for region in one.regions]) if known else "",
            }
        )
    return pd.DataFrame(rows)


def _numbers(region: Region) -> list[float]:
    return [*region.box, region.area, float(f"{region.peak:.6g}")]


def _coco(photographs: list[Photograph], info: dict[str, Any]) -> dict[str, Any]:
    """COCO's data set of the regions; each category is a product."""
    read = [one for one in photographs if not one.failure]
    names = {name: n for n, name in enumerate(dict.fromkeys(one.decision.category or "unknown" for one in read), 1)}
    marked = [(one, region) for one in read for region in one.regions]
    return {
        "info": {"description": "Regions above the pixel threshold; score is the map's peak.", **info},
        "licenses": [],
        "images": [
            {"id": one.number, "file_name": one.path, "width": one.size[1], "height": one.size[0]} for one in read
        ],
        "categories": [{"id": n, "name": name, "supercategory": "defect of"} for name, n in names.items()],
        "annotations": [
            annotation(
                region, one.size, id=n, image_id=one.number, category_id=names[one.decision.category or "unknown"]
            )
            for n, (one, region) in enumerate(marked, 1)
        ],
    }


def _common(paths: list[str]) -> str:
    """The folder that holds all of them; "" where there is none, or but one."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    return os.path.commonpath(folders) if len(paths) > 1 else ""


def _shown(one: Photograph, root: str, small: Path) -> page.Shown:
    decision = one.decision
    how = "" if decision.by in ("", "only one") else f" ({decision.by})"
    facts = {
        "category": f"{decision.category}{how}" if decision.category else "",
        "score": "" if math.isnan(decision.score) else f"{decision.score:.4g}",
        "defect above": f"{decision.threshold.value:.4g}" if decision.threshold else "",
        "outlined above": f"{decision.pixel_threshold.value:.4g}" if decision.pixel_threshold and one.size[0] else "",
        "p-value": "" if one.failure or math.isnan(decision.p_value) else f"{decision.p_value:.2g}",
        "size": f"{one.size[1]} x {one.size[0]} pixels" if one.size[0] else "",
        "reason": one.failure or decision.reason,
    }
    return page.Shown(
        os.path.relpath(one.path, root) if root else one.path,
        decision.verdict,
        facts,
        [(*region.box, region.area, region.peak) for region in one.regions],
        [small / f"{one.number:06d}-{panel}.jpg" for panel in range(len(page.PANELS) if one.name else 0)],
        (f"{one.scale[0]:.3g}", f"{one.scale[1]:.3g}") if one.scale else ("", ""),
    )
