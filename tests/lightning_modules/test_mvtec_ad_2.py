"""A run on MVTec AD 2: AU-PRO to its own limit, light told apart, and the files of its evaluation server."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datamodules import DataError
from lightning_modules.metrics import AnomalyMetrics
from lightning_modules.prediction.geometry import to_photograph
from lightning_modules.running.command_line import main
from lightning_modules.running.submission import link

SIZE = (72, 90)
LIGHTS = ("regular", "overexposed")


def image(path: Path, seed: int, light: str, defect: bool = False) -> np.ndarray:
    """Writes a part under a light, with its mask if it is defective."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] - np.array([36, 45])[:, None, None]
    inside = (abs(rows) < 24) & (abs(columns) < 12)
    grey = np.where(inside, 150, 50) + rng.normal(0, 5, SIZE) + (60 if light == "overexposed" else 0)
    mask = np.zeros(SIZE, np.uint8)
    if defect:
        top, left = rng.integers(20, 40, 2)
        mask[top : top + 8, left : left + 12] = 255
        grey[mask > 0] = 255 - grey[mask > 0]
        file = path.parents[1] / "ground_truth" / "bad" / f"{path.stem}_mask.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), grey.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def run(make_project, tmp_path_factory):
    """A trained project on two categories in the layout of MVTec AD 2; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("ad2")
    for number, category in enumerate(("can", "vial")):
        base, seed = folder / "data" / category, 1000 * number
        for k in range(4):
            image(base / "train" / "good" / f"{k:03d}_regular.png", seed + k, "regular")
        for k in range(2):
            image(base / "validation" / "good" / f"{k:03d}_regular.png", seed + 10 + k, "regular")
        for k, light in enumerate(LIGHTS * 2):
            image(base / "test_public" / "good" / f"{k:03d}_{light}.png", seed + 20 + k, light)
            image(base / "test_public" / "bad" / f"{k:03d}_{light}.png", seed + 30 + k, light, defect=True)
        image(base / "test_private" / "000_regular.png", seed + 40, "regular")
        for k in range(2):
            image(base / "test_private_mixed" / f"{k:03d}_mixed.png", seed + 50 + k, LIGHTS[k])
    project = make_project(folder, folder / "data", "mvtec_ad_2")
    torch.set_num_threads(1)
    project.run("--trainer.max_epochs=1")
    return project


def test_record_has_au_pro_to_the_data_sets_own_limit_under_a_name_that_states_it(run):
    record = run.record()
    table = record.metrics
    assert {"pixel_aupro", "pixel_aupro_0.05"} <= set(table.metric)
    assert "FPR limit 0.05" in record.record.metrics["definitions"]["pixel_aupro_0.05"]


def test_seg_f1_is_measured_in_both_readings_at_a_threshold_of_normal_images(run):
    record = run.record()
    rows = record.metrics[record.metrics.metric.str.startswith("seg_f1")]
    assert set(rows.metric) == {"seg_f1", "seg_f1_images", "seg_f1_threshold"}
    assert set(rows.variant) == {"", "light=regular", "light=shifted"}
    assert rows[rows.metric != "seg_f1_threshold"].value.between(0, 1).all()
    assert "counted over all pixels" in record.record.metrics["definitions"]["seg_f1"]
    kept = pd.read_csv(record.path / "normal_pixels.csv", keep_default_na=False).set_index("category")
    limits = rows[(rows.metric == "seg_f1_threshold") & (rows.variant == "")].set_index("category").value
    for category in ("can", "vial"):
        assert limits[category] == pytest.approx(kept["mean"][category] + 3 * kept["sd"][category])


def test_each_light_is_measured_on_its_images_alone(run):
    record = run.record()
    table = record.metrics
    assert set(table.variant) == {"", "light=regular", "light=shifted"}
    scores = pd.read_csv(run.results / "runs" / "single" / "first" / "image_scores.csv")
    for light, of_light in scores.groupby(scores.path.str.contains("_regular")):
        rows = table[(table.variant == ("light=regular" if light else "light=shifted")) & (table.scope == "category")]
        for category, mine in of_light.groupby("category"):
            good, bad = (mine[mine.label == label].image_score.to_numpy() for label in (0, 1))
            expected = (bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2
            row = rows[(rows.category == category) & (rows.metric == "image_auroc")]
            assert row.value.item() == pytest.approx(expected)
            assert row.n.item() == len(mine)


def test_a_run_may_ask_for_other_limits(run):
    run.run("--trainer.max_epochs=1", "--run.fpr_limits=[0.1]", name="other")
    names = {name for name in run.record("other").metrics.metric if "aupro" in name}
    assert names == {"pixel_aupro_0.1"}


@pytest.mark.parametrize("limits", ["[0]", "[1.5]", "[]"])
def test_a_limit_that_is_no_rate_is_refused(run, limits):
    with pytest.raises(SystemExit, match="fpr_limits"):
        run.run(f"--run.fpr_limits={limits}", name="never")


# --- the server's files -----------------------------------------------------------------------------------------------


def read_tiff(path: Path) -> np.ndarray:
    """An independent reading: Pillow's tags and the bytes at the strip's place."""
    data = path.read_bytes()
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2(data[:8])
    with path.open("rb") as file:
        file.seek(tags.next)
        tags.load(file)
    assert (tags[258], tags[259], tags[277], tags[339]) == ((16,), 1, 1, (3,))
    first, count = tags[273][0], tags[279][0]
    return np.frombuffer(data[first : first + count], "<f2").reshape(tags[257], tags[256])


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "files"
    main(["submission", "--run", str(run.results / "runs" / "single" / "first"), "--out", str(out)])
    return out


def test_every_private_image_has_a_map_and_a_mask_of_its_size_in_the_servers_layout(files):
    expected = {
        f"{category}/{part}"
        for category in ("can", "vial")
        for part in ("test_private/000_regular", "test_private_mixed/000_mixed", "test_private_mixed/001_mixed")
    }
    for folder, suffix in (("anomaly_images", ".tiff"), ("anomaly_images_thresholded", ".png")):
        found = {str(p.relative_to(files / folder).with_suffix("")) for p in (files / folder).rglob(f"*{suffix}")}
        assert found == expected
    assert sorted(path.name for path in files.iterdir()) == ["anomaly_images", "anomaly_images_thresholded"]


def test_masks_are_the_maps_above_the_threshold_that_is_one(files):
    for tiff in (files / "anomaly_images").rglob("*.tiff"):
        values = read_tiff(tiff)
        png = files / "anomaly_images_thresholded" / tiff.relative_to(files / "anomaly_images").with_suffix(".png")
        mask = np.asarray(Image.open(png))
        assert values.shape == mask.shape == SIZE
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(mask, np.where(values > 1, 255, 0))


def test_maps_are_those_of_predict_over_the_validation_images_mean_and_three_deviations(files, run):
    record, data = run.results / "runs" / "single" / "first", run.data
    maps = {}
    for part in ("validation/good", "test_private"):
        folder = run.results / "work" / part.replace("/", "-")
        main(["predict", f"--run={record}", f"--images={data / 'can' / part}", f"--out={folder}"])
        maps[part] = np.stack([np.load(path) for path in sorted(folder.glob("*.npy"))])
    normal = maps["validation/good"].astype(np.float64)
    threshold = normal.mean() + 3 * normal.std()
    expected = cv2.resize(maps["test_private"][0], SIZE[::-1], interpolation=cv2.INTER_LINEAR) / threshold
    found = read_tiff(files / "anomaly_images/can/test_private/000_regular.tiff")
    np.testing.assert_allclose(found, expected, rtol=2**-10)  # half a unit of float16's 11 bits, twice


def test_a_map_of_a_crop_is_put_back_where_it_was_seen():
    values = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    native = to_photograph(values, (12, 18), ((6, 6), (4, 4)))
    np.testing.assert_array_equal(native[2:10, 3:15], cv2.resize(values, (12, 8), interpolation=cv2.INTER_LINEAR))
    outside = np.ones((12, 18), bool)
    outside[2:10, 3:15] = False
    assert (native[outside] == 1).all()


def test_a_submission_needs_a_run_on_this_data_and_a_new_folder(files, run, trained, tmp_path):
    with pytest.raises(SystemExit, match="is there already"):
        main(["submission", "--run", str(run.results / "runs/single/first"), "--out", str(files)])
    with pytest.raises(SystemExit, match="trained on mvtec_ad"):
        main(["submission", "--run", str(trained.results / "runs/single/first"), "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="no record"):
        main(["submission", "--run", str(tmp_path), "--out", str(tmp_path / "new")])


def test_limits_share_the_exact_curve():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 32, 32), bool)
    masks[2:, 8:16, 8:16] = True
    maps = rng.normal(size=masks.shape).astype(np.float32) + masks
    values = {}
    for limits in ((0.05, 0.3), (0.05,)):
        metrics = AnomalyMetrics(["a"], fpr_limits=limits)
        metrics.update(maps, masks, np.arange(4.0), [0, 0, 1, 1], ["a"] * 4, np.arange(4))
        values[limits] = metrics.compute().value("pixel_aupro_0.05", "a")
    assert values[0.05, 0.3] == values[0.05,]


def test_two_private_images_of_one_name_but_for_the_suffix_are_refused(tmp_path):
    for folder, names in (("validation/good", ["000.png"]), ("test_private", ["000.png", "000.jpg"]),
                          ("test_private_mixed", ["000.png"])):  # fmt: skip
        place = tmp_path / "root/can" / folder
        place.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(place / name)
    with pytest.raises(DataError, match=r"000.jpg and 000.png: their files for the server would have one name"):
        link(tmp_path / "root", ["can"], tmp_path / "links")
