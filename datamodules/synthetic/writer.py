"""Writing the embedded benchmark to disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from datamodules.errors import DataError
from datamodules.synthetic.canvas import blur, expose
from datamodules.synthetic.categories import CATEGORIES, LOGICAL
from datamodules.synthetic.defects import STRUCTURAL
from results.common.did_you_mean import did_you_mean

VERSION = 1
"""Raised whenever the generator's pictures change: results on different versions do not compare."""
MANIFEST = "synthetic.json"
LAYOUTS = ("mvtec", "mvtec_loco")
ANOMALY_TYPES = {**dict.fromkeys(STRUCTURAL, "structural"), **dict.fromkeys(LOGICAL, "logical")}
_VISIBLE = 5 / 255
"""Change of any colour channel before noise that counts as defective."""


@dataclass(frozen=True)
class Plan:
    """What to generate.

    Args:
        seed: of everything.
        size: side of the square images in pixels.
        train: normal training images per category.
        test: normal test images per category.
        defects: test images per kind of defect, their severity spread from subtle to obvious.
        categories: names to generate, None for all.
        layout: mvtec or mvtec_loco.
    """

    seed: int = 0
    size: int = 224
    train: int = 40
    test: int = 8
    defects: int = 3
    categories: tuple[str, ...] | None = None
    layout: str = "mvtec"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise DataError(f"Unknown layout {self.layout!r}. {did_you_mean(self.layout, LAYOUTS)}")
        for name in self.categories or ():
            if name not in CATEGORIES:
                raise DataError(f"Unknown synthetic category {name!r}. {did_you_mean(name, CATEGORIES)}")
        if self.size < 64 or self.train < 1 or min(self.test, self.defects) < 0:
            raise DataError(
                f"size must be at least 64, train at least 1, test and defects at least 0; found size={self.size}, "
                f"train={self.train}, test={self.test}, defects={self.defects}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.categories or CATEGORIES))


def render_normal(category: str, seed: int, part: str, index: int, size: int) -> np.ndarray:
    """A normal photograph, uint8 (size, size, 3) RGB. `part` (train, val, test) and `index` choose which one."""
    return _twins(category, seed, part, index, size)[0]


def render_defect(
    category: str, seed: int, defect: str, index: int, size: int, severity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A defective photograph with its mask and its flawless twin.

    The twin shows the same product under the same light with the same noise. Outside the mask both are equal, byte for
    byte; the mask is where the defect changes what the camera sees before noise.

    Args:
        category: entry of CATEGORIES. seed, index: choose the photograph. size: side in pixels.
        defect: one of the category's structural or logical defects.
        severity: 0 (subtle) to 1 (obvious).

    Returns:
        image uint8 (size, size, 3) RGB, mask bool (size, size), twin uint8 (size, size, 3) RGB.
    """
    image, mask, twin = _twins(category, seed, defect, index, size, defect, severity)[:3]
    return image, mask, twin


def _stream(seed: int, *keys: str | int) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(k.encode()) if isinstance(k, str) else k for k in keys)])


def _twins(
    category: str, seed: int, part: str, index: int, size: int, defect: str | None = None, severity: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind = CATEGORIES[category]
    scene = kind.draw(_stream(seed, category, part, index))
    canvas = scene.render(size)
    clean = canvas.photograph(scene.light)
    noise = _stream(seed, category, part, index, 1)
    state = noise.bit_generator.state
    twin = expose(clean, scene.light, noise)
    if defect is None:
        return twin, np.zeros((size, size), bool), twin
    for attempt in range(20):
        rng = _stream(seed, category, part, index, 2, attempt)
        if defect in LOGICAL:
            flawed = scene.edited(defect, rng).render(size)
        else:
            flawed = canvas.copy()
            STRUCTURAL[defect](flawed, rng, min(1.0, severity + 0.05 * attempt))
        seen = flawed.photograph(scene.light)
        mask = _changed(seen, clean)
        if mask.sum() >= 0.0008 * size * size:
            break
    else:
        raise RuntimeError(f"{category}: {defect} number {index} of seed {seed} leaves no visible trace.")
    noise.bit_generator.state = state
    image = expose(np.where(mask[..., None], seen, clean), scene.light, noise)
    return image, mask, twin


def _changed(seen: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Where a defect is visible: changed pixels, specks dropped, gaps closed, small holes filled."""
    size = seen.shape[0]
    change = blur(np.abs(seen - clean).max(axis=2), 0.5)
    mask: np.ndarray = (change > _VISIBLE).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel, iterations=max(1, size // 110))
    strong = cv2.morphologyEx((change > 4 * _VISIBLE).astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    mask = np.bitwise_or(cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel), strong)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    small = max(6, size * size // 6000)
    keep = np.array([False] + [stats[i, cv2.CC_STAT_AREA] >= small for i in range(1, count)])
    mask = keep[labels].astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        if cv2.contourArea(contour) < 0.002 * size * size:
            cv2.drawContours(mask, [contour], -1, 1, cv2.FILLED)
    return mask.astype(bool)


def _severities(count: int) -> list[float]:
    return [(i + 0.5) / count for i in range(count)]


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), stored, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise DataError(f"{path}: cannot be written.")


def _write_category(root: Path, plan: Plan, name: str) -> None:
    cv2.setNumThreads(1)  # the categories run in parallel
    loco = plan.layout == "mvtec_loco"
    folder = root / name
    counts = {"train": plan.train, "validation": max(1, plan.train // 6) if loco else 0, "test": plan.test}
    for part, number in counts.items():
        for index in range(number):
            image = render_normal(name, plan.seed, part, index, plan.size)
            _write(folder / part / "good" / f"{index:03d}.png", image)
    if loco:
        text = json.dumps(_defects_config(plan.size), indent=2)
        (folder / "defects_config.json").write_text(text + "\n", encoding="utf-8")
    written = dict.fromkeys(("structural", "logical"), 0)
    for defect in CATEGORIES[name].defects:
        for index, severity in enumerate(_severities(plan.defects)):
            image, mask, _ = render_defect(name, plan.seed, defect, index, plan.size, severity)
            if loco:
                kind = ANOMALY_TYPES[defect]
                stem, home = f"{written[kind]:03d}", f"{kind}_anomalies"
                written[kind] += 1
                value, mask_name = _PIXEL_VALUES[defect], f"{stem}/000.png"
            else:
                stem, home, value, mask_name = f"{index:03d}", defect, 255, f"{index:03d}_mask.png"
            _write(folder / "test" / home / f"{stem}.png", image)
            _write(folder / "ground_truth" / home / mask_name, mask.astype(np.uint8) * np.uint8(value))


_PIXEL_VALUES = {defect: 255 - number for number, defect in enumerate(ANOMALY_TYPES)}


def _defects_config(size: int) -> list[dict]:
    """Structural defects must be found whole; of a logical one an area of 0.4 % of the image is enough."""
    return [
        {
            "defect_name": defect,
            "pixel_value": value,
            "saturation_threshold": 1.0 if ANOMALY_TYPES[defect] == "structural" else round(0.004 * size * size),
            "relative_saturation": ANOMALY_TYPES[defect] == "structural",
        }
        for defect, value in _PIXEL_VALUES.items()
    ]


def generate(root: str | Path, plan: Plan | None = None, workers: int | None = None) -> Path:
    """Write the benchmark into a new or empty folder, or leave a complete one of the same plan as it is.

    The bytes depend on the plan alone (on one platform with the same numpy and OpenCV). The folder appears when it is
    complete: an interrupted run leaves nothing that a later one would take for data.

    Args:
        root: folder to write into.
        plan: what to generate, the default benchmark if None.
        workers: processes; None takes up to 4 of the cores.

    Raises:
        DataError: the folder holds something else, such as a benchmark of another plan or generator version.
    """
    plan, root = plan or Plan(), Path(root).expanduser().absolute()
    if _is_complete(root, plan):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-partial-", dir=root.parent))
    try:
        _write_all(partial, plan, workers or min(4, os.cpu_count() or 1))
        (partial / MANIFEST).write_text(json.dumps(describe(plan), indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        if not _is_complete(root, plan):  # another process may have been quicker
            if root.is_dir():
                root.rmdir()
            partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _is_complete(root: Path, plan: Plan) -> bool:
    """Whether the folder holds this very benchmark; DataError if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    wanted = describe(plan)
    if (root / MANIFEST).is_file():
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        if found == wanted:
            return True
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        difference = "; ".join(f"{key} is {found.get(key)!r}, asked for is {wanted[key]!r}" for key in keys)
        raise DataError(f"{root} holds a benchmark of another kind: {difference}. Name a new folder or remove it.")
    raise DataError(f"{root} exists and holds something other than this benchmark: name a new folder or remove it.")


def _write_all(root: Path, plan: Plan, workers: int) -> None:
    if workers == 1:
        for name in plan.names:
            _write_category(root, plan, name)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_write_category, root, plan, name) for name in plan.names]:
            job.result()


def describe(plan: Plan) -> dict:
    """Content of the manifest that is written last, and so marks a benchmark as complete."""
    options = {key: value for key, value in asdict(plan).items() if key != "categories"}
    return {
        "generator": "UniRecon synthetic",
        "version": VERSION,
        **options,
        "categories": list(plan.names),
        "anomaly_types": ANOMALY_TYPES,
    }
