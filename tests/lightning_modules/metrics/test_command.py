"""`python -m lightning_modules.metrics FOLDER` and the use of the package alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datamodules import images
from lightning_modules.metrics import folder as folder_reading
from lightning_modules.metrics.__main__ import main as run

SUFFIXES = [".npy", ".npz", ".tiff"]


def save_map(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, map=values, other=1)
    else:
        Image.fromarray(values).save(path)


def save_mask(path, mask, scale=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(mask, np.ones((scale, scale), dtype=bool)).astype(np.uint8) * 255).save(path)


@pytest.fixture
def saved(tmp_path, problem):
    """A folder in MVTec's layout and the problem it holds."""
    p = problem(31, images=8, size=(10, 12), categories=2)
    for i, (values, mask) in enumerate(zip(p.maps, p.masks, strict=True)):
        defect = "hole" if mask.any() else "good"
        save_map(tmp_path / p.categories[i] / "test" / defect / f"{i:03}{SUFFIXES[i % 3]}", values)
        if mask.any():
            folder = tmp_path / p.categories[i] / "ground_truth" / defect
            save_mask(folder / f"{i:03}_mask.png", mask, scale=1 + i % 2)
    return tmp_path, p


def test_a_folder_gives_the_numbers_of_the_arrays(saved, tmp_path, capsys):
    folder, p = saved
    assert run([str(folder), "--csv", str(tmp_path / "numbers.csv")]) == 0
    written = pd.read_csv(tmp_path / "numbers.csv", keep_default_na=False, na_values={"value": [""]})
    expected = p.compute(categories=["c0", "c1"]).table
    keys = ["variant", "scope", "dataset", "category", "metric", "n", "reason"]
    pd.testing.assert_frame_equal(written[keys], expected[keys])
    np.testing.assert_allclose(written.value, expected.value, rtol=0, atol=1e-13)
    printed = capsys.readouterr().out
    assert "pooled" in printed
    assert f"{100 * expected.value.iloc[0]:.2f}" in printed


def test_a_csv_file_names_maps_masks_datasets_and_scores(saved, tmp_path):
    folder, p = saved
    maps = sorted(folder.glob("*/test/*/*"), key=lambda f: f.stem)
    rows = []
    for i, file in enumerate(maps):
        mask = folder / p.categories[i] / "ground_truth" / "hole" / f"{i:03}_mask.png"
        rows.append(
            (file.relative_to(folder), "d/" + p.categories[i], p.labels[i], mask if mask.exists() else "", "d", -i)
        )
    frame = pd.DataFrame(rows, columns=["map", "category", "label", "mask", "dataset", "score"])
    frame.to_csv(folder / "manifest.csv", index=False)
    assert run([str(folder), "--metrics", "image_auroc,pixel_ap", "--csv", str(tmp_path / "n.csv"), "--no-pooled"]) == 0
    table = pd.read_csv(tmp_path / "n.csv")
    assert set(table.dataset.dropna()) == {"d"}
    assert set(table.metric) == {"image_auroc", "pixel_ap"}
    expected = p.compute().value("pixel_ap", "c1")
    assert table.query("category == 'd/c1' and metric == 'pixel_ap'").value.item() == pytest.approx(expected, abs=1e-13)


def test_masks_may_lie_in_the_dataset(saved, tmp_path):
    folder, p = saved
    for name in ("c0", "c1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (folder / name / "ground_truth").rename(tmp_path / "data" / name / "ground_truth")
    csv = tmp_path / "n.csv"
    assert run([str(folder), "--masks", str(tmp_path / "data"), "--csv", str(csv), "--on-disk", str(tmp_path)]) == 0
    value = pd.read_csv(csv).query("category == 'c0' and metric == 'dsc'").value.item()
    assert value == pytest.approx(p.compute().value("dsc", "c0"), abs=1e-13)


def test_missing_files_and_bad_rows_are_named(saved, tmp_path, capsys):
    folder, p = saved
    anomalous = int(np.flatnonzero(p.labels)[0])
    mask = folder / p.categories[anomalous] / "ground_truth" / "hole" / f"{anomalous:03}_mask.png"
    mask.unlink()
    assert run([str(folder)]) == 2
    assert str(mask) in capsys.readouterr().err
    assert run([str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert run([str(tmp_path / "empty")]) == 2
    assert "<category>/test/<defect>/<name>" in capsys.readouterr().err
    table = tmp_path / "rows.csv"
    for text, message in (
        ("map,label\na.npy,1\n", "missing columns ['category']"),
        ("map,category,label\na.npy,x,yes\n", "line 2: label 'yes'"),
        ("map,category,label,score\na.npy,x,1,high\n", "line 2: score 'high'"),
        ("map,category,label\na.npy,x,1\n", "a.npy"),
        ("map,category,label\n", "has no rows"),
    ):
        table.write_text(text)
        assert run([str(table)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.program
def test_the_package_loads_without_lightning_timm_or_wandb():
    code = (
        "import sys, lightning_modules.metrics; "
        "print([m for m in ('lightning', 'pytorch_lightning', 'timm', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.program
def test_the_command_explains_itself():
    command = [sys.executable, "-m", "lightning_modules.metrics", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ground_truth" in text
    assert "--csv" in text


def _masks(truth, folder):
    """The same mask in many kinds of file, each with traps of its own: name -> file."""
    grey = Image.fromarray(truth.astype(np.uint8) * 255)
    white_is_first = Image.fromarray(1 - truth.astype(np.uint8))
    white_is_first.putpalette([255, 255, 255, 0, 0, 0])
    opaque = Image.new("L", grey.size, 255)
    ids = Image.fromarray(truth.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    kinds = [
        ("grey.png", grey, {}),
        ("ids.png", ids, {}),
        ("one.png", grey.convert("1"), {}),
        ("palette.png", white_is_first, {}),
        ("palette.gif", white_is_first.convert("RGB").quantize(2), {}),
        ("alpha.png", Image.merge("LA", (grey, opaque)), {}),
        ("rgba.png", Image.merge("RGBA", (grey, grey, grey, opaque)), {}),
        ("deep.png", Image.fromarray(truth.astype(np.uint16)), {}),
        ("int.tif", Image.fromarray(truth.astype(np.int32)), {}),
        ("float.tif", Image.fromarray(truth.astype(np.float32)), {}),
        ("lossy.jpg", grey, {"quality": 60}),
        ("lossy.webp", grey, {"quality": 60}),
        ("lossy.tif", grey, {"compression": "jpeg", "quality": 60}),
        ("exact.webp", ids, {"lossless": True}),
        ("turned.png", grey.rotate(180), {"exif": exif}),
        ("UPPER.PNG", grey, {}),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, options in kinds:
        image.save(folder / name, **options)
    return [folder / name for name, _, _ in kinds]


def test_masks_are_read_by_the_rules_of_the_data_module(tmp_path):
    """The package stands alone, so it has lines of its own for what `datamodules.images` does: they must agree."""
    truth = np.zeros((40, 48), bool)
    truth[8:24, 16:40] = True
    for file in _masks(truth, tmp_path):
        np.testing.assert_array_equal(folder_reading.read_mask(file, truth.shape), truth, err_msg=file.name)
        np.testing.assert_array_equal(images.read_mask([file]), truth, err_msg=file.name)


@pytest.mark.parametrize("normal", ["ok", "Good", "NORMAL"])
def test_folders_of_normal_images_may_be_called_as_in_the_data_module(tmp_path, normal):
    save_map(tmp_path / "c" / "test" / normal / "0.npy", np.zeros((4, 5), np.float32))
    save_map(tmp_path / "c" / "test" / "hole" / "0.npy", np.ones((4, 5), np.float32))
    assert [row.label for row in folder_reading.find_maps(tmp_path)] == [
        int(name == "hole") for name in sorted((normal, "hole"))
    ]


def test_a_mask_may_be_a_folder_or_have_a_suffix_in_capitals(tmp_path):
    for name in ("0", "1"):
        save_map(tmp_path / "c" / "test" / "hole" / f"{name}.npy", np.ones((4, 5), np.float32))
    masks = tmp_path / "c" / "ground_truth" / "hole"
    part = np.zeros((4, 5), bool)
    part[0] = True
    save_mask(masks / "0_mask.PNG", part)
    save_mask(masks / "1" / "000.png", part)
    save_mask(masks / "1" / "001.png", part[::-1])
    marked = [folder_reading.read_mask(row.mask, (4, 5)).sum() for row in folder_reading.find_maps(tmp_path)]
    assert marked == [5, 10]


@pytest.fixture
def large_mask(tmp_path) -> Path:
    """Two maps, and for one of them a mask of 200 megapixels."""
    save_map(tmp_path / "c" / "test" / "good" / "0.npy", np.zeros((4, 5), np.float32))
    save_map(tmp_path / "c" / "test" / "hole" / "0.npy", np.ones((4, 5), np.float32))
    mask = tmp_path / "c" / "ground_truth" / "hole" / "0_mask.png"
    mask.parent.mkdir(parents=True)
    Image.new("1", (20_000, 10_000)).save(mask)
    return mask


@pytest.mark.program
def test_a_limit_of_size_may_be_raised(large_mask, tmp_path):
    assert run([str(tmp_path), "--max-megapixels", "300"]) == 0


def test_files_beyond_the_limit_and_damaged_ones_are_one_sentence(large_mask, tmp_path, capsys):
    assert run([str(tmp_path)]) == 2
    assert "20000 x 10000 pixels are more than 179 megapixels" in capsys.readouterr().err
    for damaged in (large_mask.read_bytes()[:60], b"no image"):
        large_mask.write_bytes(damaged)
        assert run([str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
