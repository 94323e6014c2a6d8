"""Tiny datasets on disk, each in the layout that its users download."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image


def write_image(path: Path, value: int = 120, size: tuple[int, int] = (40, 48), seed: int | None = None) -> Path:
    """A small RGB image (height, width) of one grey value, or of noise with a seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((*size, 3), value, np.uint8)
    if seed is not None:
        image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    if path.suffix in (".avif", ".gif"):  # older OpenCVs have no writer for them
        Image.fromarray(image).save(path)
    else:
        assert cv2.imwrite(str(path), image)
    return path


def write_mask(path: Path, value: int = 255, size: tuple[int, int] = (40, 48), rows: slice = slice(4, 9)) -> Path:
    """A mask (height, width) with `value` in some rows and columns 5 to 11."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[rows, 5:12] = value
    assert cv2.imwrite(str(path), mask)
    return path


def mvtec(root: Path, category: str = "bottle", train: int = 4, normal: int = 2, defects: int = 2) -> Path:
    """One category like MVTec AD's; image k of a defect has its mask in rows k to k + 3."""
    for k in range(train):
        write_image(root / category / "train" / "good" / f"{k:03d}.png", seed=k)
    for k in range(normal):
        write_image(root / category / "test" / "good" / f"{k:03d}.png", seed=100 + k)
    for k in range(defects):
        write_image(root / category / "test" / "broken" / f"{k:03d}.png", seed=200 + k)
        write_mask(root / category / "ground_truth" / "broken" / f"{k:03d}_mask.png", rows=slice(k, k + 3))
    return root


def loco(root: Path, category: str = "pushpins") -> Path:
    """One category like MVTec LOCO's: a folder of masks per image, defect ids as pixel values."""
    base = root / category
    for k in range(3):
        write_image(base / "train" / "good" / f"{k:03d}.png", seed=k)
    for k in range(2):
        write_image(base / "validation" / "good" / f"{k:03d}.png", seed=10 + k)
    write_image(base / "test" / "good" / "000.png", seed=20)
    write_image(base / "test" / "logical_anomalies" / "000.png", seed=30)
    write_image(base / "test" / "structural_anomalies" / "000.png", seed=40)
    write_mask(base / "ground_truth" / "logical_anomalies" / "000" / "000.png", 236, rows=slice(0, 3))
    write_mask(base / "ground_truth" / "logical_anomalies" / "000" / "001.png", 237, rows=slice(10, 16))
    write_mask(base / "ground_truth" / "structural_anomalies" / "000" / "000.png", 1, rows=slice(2, 5))
    (base / "ground_truth" / "logical_anomalies" / "000" / ".DS_Store").write_bytes(b"junk")
    config = [
        {"defect_name": "missing", "pixel_value": 236, "saturation_threshold": 10, "relative_saturation": False},
        {"defect_name": "extra", "pixel_value": 237, "saturation_threshold": 0.5, "relative_saturation": True},
        {"defect_name": "broken", "pixel_value": 1, "saturation_threshold": 1.0, "relative_saturation": True},
    ]
    (base / "defects_config.json").write_text(json.dumps(config))
    return root


def btad(root: Path) -> Path:
    """Category 01 with .bmp images and .png masks, category 03 with .bmp for both."""
    base = root / "BTech_Dataset_transformed"
    for category, mask_suffix in (("01", ".png"), ("03", ".bmp")):
        for k in range(2):
            write_image(base / category / "train" / "ok" / f"{k:04d}.bmp", seed=k)
        write_image(base / category / "test" / "ok" / "0000.bmp", seed=5)
        write_image(base / category / "test" / "ko" / "0000.bmp", seed=6)
        write_mask(base / category / "ground_truth" / "ko" / f"0000{mask_suffix}", 200)
    return root


def visa_raw(root: Path) -> Path:
    """Object candle as downloaded: names from a CSV file, masks of ones."""
    rows = []
    for k in range(3):
        image = f"candle/Data/Images/Normal/{k:04d}.JPG"
        write_image(root / image, seed=k)
        rows.append(("candle", "train" if k < 2 else "test", "normal", image, ""))
    image, mask = "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png"
    write_image(root / image, seed=9)
    write_mask(root / mask, 1)
    rows.append(("candle", "test", "anomaly", image, mask))
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("object", "split", "label", "image", "mask"))
        writer.writerows(rows)
    return root


def mvtec_ad_2(root: Path, category: str = "can") -> Path:
    """One category like MVTec AD 2's: lights in the names, private images without labels."""
    base = root / category
    for k in range(3):
        write_image(base / "train" / "good" / f"{k:03d}_regular.png", seed=k)
    write_image(base / "validation" / "good" / "000_regular.png", seed=10)
    for k, light in enumerate(("regular", "overexposed", "shift_1")):
        write_image(base / "test_public" / "good" / f"000_{light}.png", seed=20 + k)
        write_image(base / "test_public" / "bad" / f"000_{light}.png", seed=30 + k)
        write_mask(base / "test_public" / "ground_truth" / "bad" / f"000_{light}_mask.png")
    write_image(base / "test_private" / "000_regular.png", seed=40)
    write_image(base / "test_private_mixed" / "000_mixed.png", seed=41)
    return root


def real_iad(
    root: Path, category: str = "toy", images: str = "realiad_256", jsons: str = "realiad_jsons/realiad_jsons"
) -> Path:
    """One category like Real-IAD's: two normal objects to train on, and of the test's two objects one with a scratch that
    only the first of its two views shows."""
    folder = root / images / category
    train, test = [], []
    for number in (1, 2, 3):
        for view in (1, 2):
            name = f"OK/S{number:04d}/{category}_{number:04d}_OK_C{view}_20230101.jpg"
            write_image(folder / name, seed=10 * number + view)
            entry = {"category": category, "anomaly_class": "OK", "image_path": name, "mask_path": None}
            (train if number < 3 else test).append(entry)
    stem = f"NG/HS/S0009/{category}_0009_NG_HS_C1_20230101"
    write_image(folder / f"{stem}.jpg", seed=91)
    write_mask(folder / f"{stem}.png")
    kind = {"category": category, "anomaly_class": "HS"}
    test.append({**kind, "image_path": f"{stem}.jpg", "mask_path": f"{stem}.png"})
    hidden = stem.replace("_C1_", "_C2_")
    write_image(folder / f"{hidden}.jpg", seed=92)
    test.append({**kind, "image_path": f"{hidden}.jpg", "mask_path": None})
    file = root / jsons / f"{category}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    meta = {"prefix": f"{category}/", "normal_class": "OK", "pre_transform": None}
    file.write_text(json.dumps({"meta": meta, "train": train, "test": test}))
    return root


def folders(root: Path, side: int) -> Path:
    """Two categories, a and b, of five square noisy training images of this side."""
    for number, category in enumerate(("a", "b")):
        for k in range(5):
            write_image(root / category / "train" / "good" / f"{k}.png", size=(side, side), seed=10 * number + k)
    return root


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Builders of tiny datasets and files."""
    return SimpleNamespace(
        image=write_image,
        mask=write_mask,
        mvtec=mvtec,
        loco=loco,
        btad=btad,
        visa_raw=visa_raw,
        mvtec_ad_2=mvtec_ad_2,
        real_iad=real_iad,
        folders=folders,
    )
