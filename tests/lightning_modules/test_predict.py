"""`predict`: scores, raw maps and heat maps of any folder of images with a trained run."""

from __future__ import annotations

import csv
import os
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_modules.running.command_line import main


@pytest.fixture(scope="module")
def predictions(trained, data_root, tmp_path_factory):
    """Files that `predict` wrote for all test images of one category, started as `make predict` does."""
    run = trained.results / "runs" / "single" / "first"
    main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"])
    return trained.results / "work" / "single" / "first" / "predictions"


def test_scores_are_those_of_the_test_run(predictions, trained):
    with open(predictions / "scores.csv") as file:
        rows = {row["image"]: float(row["image_score"]) for row in csv.DictReader(file)}
    tested = (
        pd.read_csv(trained.results / "runs" / "single" / "first" / "image_scores.csv").set_index("path").image_score
    )
    assert len(rows) == 5
    for path, score in rows.items():
        assert score == pytest.approx(tested[path], rel=1e-5)


def test_every_image_has_its_raw_map_and_its_heat_map(predictions):
    maps = sorted(predictions.glob("*.npy"))
    assert len(maps) == 5
    for path in maps:
        values = np.load(path)
        assert values.shape == (64, 64)
        assert values.dtype == np.float32
        assert Image.open(path.with_suffix(".jpg")).size == (64, 64)


def test_a_heat_map_does_not_depend_on_the_images_beside_it(predictions, trained, data_root):
    run, image = trained.results / "runs" / "single" / "first", data_root / "bolt" / "test" / "good" / "000.png"
    options = [f"--data.init_args.predict_root={image}", "--run.name=alone", f"--ckpt_path={trained.checkpoint()}"]
    (trained.results / "runs" / "single" / "alone").symlink_to(run)  # the record that holds the colour scale
    main(["predict", f"--config={run / 'config.yaml'}", *options])
    (trained.results / "runs" / "single" / "alone").unlink()
    (alone,) = (trained.results / "work" / "single" / "alone" / "predictions").glob("*.jpg")
    beside = next(p for p in predictions.glob("*-000.jpg") if int(p.name[:6]) == 0)
    assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(beside)))


def test_images_of_more_than_8_bits_get_the_scores_of_the_test_run(tmp_path, write_data, make_project):
    root = write_data(tmp_path / "data", masks=False)
    for path in root.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 16)
    project = make_project(tmp_path, root, "folder")
    project.run()
    images, run = root / "bolt" / "test", project.results / "runs" / "single" / "first"
    main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={images}"])
    predicted = pd.read_csv(project.results / "work/single/first/predictions/scores.csv").set_index("image").image_score
    tested = pd.read_csv(run / "image_scores.csv").set_index("path").image_score
    assert predicted.to_dict() == pytest.approx(tested[predicted.index].to_dict(), rel=1e-5)


def test_an_earlier_prediction_leaves_no_file_behind_and_masks_are_no_images(tmp_path, data_root, make_project):
    project = make_project(tmp_path, data_root)
    project.run()
    folder = project.results / "work" / "single" / "first" / "predictions"
    for images, count in ((data_root / "bolt", 11), (data_root / "bolt" / "test" / "good" / "000.png", 1)):
        project.run(f"--data.init_args.predict_root={images}", command="predict")
        assert len(pd.read_csv(folder / "scores.csv")) == count
        assert sorted(path.suffix for path in folder.iterdir()) == [".csv", *[".jpg"] * count, *[".npy"] * count]


def test_one_bad_image_costs_only_its_own_score_and_the_exit_code_says_so(trained, data_root, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        shutil.copy(data_root / "bolt" / "test" / "good" / "000.png", images / f"{number}.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:300])
    name = os.fsencode(images) + b"/caf\xe9" + 240 * b"x" + b".png"
    shutil.copy(images / "0.png", name)
    run = trained.results / "runs" / "single" / "first"
    (trained.results / "runs" / "single" / "bad").symlink_to(run)
    options = [f"--config={run / 'config.yaml'}", "--run.name=bad", f"--ckpt_path={trained.checkpoint()}"]
    with pytest.raises(
        SystemExit, match=r"1 image could not be read and has no score.*\n.*broken\.png: .*truncated"
    ) as left:
        main(["predict", *options, f"--data.init_args.predict_root={images}"])
    assert left.value.code
    folder = trained.results / "work" / "single" / "bad" / "predictions"
    table = pd.read_csv(folder / "scores.csv", encoding_errors="surrogateescape").set_index("image")
    assert len(table) == 4
    assert "truncated" in table.reason[str(images / "broken.png")]
    assert table.image_score.isna().to_list() == table.reason.notna().to_list()
    assert table.image_score[os.fsdecode(name)] == pytest.approx(table.image_score[str(images / "0.png")])
    assert len(list(folder.glob("*.npy"))) == len(list(folder.glob("*.jpg"))) == 3
    (trained.results / "runs" / "single" / "bad").unlink()


def test_an_earlier_prediction_stays_until_the_new_one_is_complete(predictions, trained, data_root, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in predictions.iterdir()}
    monkeypatch.setattr("lightning_modules.callbacks.predictions.Predictions._replace", stop)
    run = trained.results / "runs" / "single" / "first"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={data_root / 'disc'}"])
    assert {path.name: path.read_bytes() for path in predictions.iterdir()} == before


def test_an_unreadable_image_is_named(trained, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"not an image")
    run = trained.results / "runs" / "single" / "first"
    with pytest.raises(SystemExit, match=r"photo\.png"):
        main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={tmp_path}"])
