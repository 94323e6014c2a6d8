"""`predict`: decisions, pictures and raw maps of any images with a trained run."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_modules.decisions import Decider
from lightning_modules.prediction.command import images_of
from lightning_modules.running.command_line import main
from lightning_modules.running.finding import NoRunError, find_run


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
        width, height = Image.open(path.with_suffix(".jpg")).size
        assert width >= 3 * 72, "original, map and outlines, each at the photograph's own size"
        assert height > 72


def test_a_picture_does_not_depend_on_the_images_beside_it(predictions, trained, data_root, tmp_path):
    run, image = trained.results / "runs" / "single" / "first", data_root / "bolt" / "test" / "good" / "000.png"
    main(["predict", f"--run={run}", f"--images={image}", f"--out={tmp_path / 'alone'}"])
    (alone,) = (tmp_path / "alone").glob("*.jpg")
    beside = next(p for p in predictions.glob("*-000.jpg") if int(p.name[:6]) == 0)
    assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(beside)))


def test_every_photograph_gets_a_decision_in_the_table_the_coco_file_and_the_page(predictions, trained):
    table = pd.read_csv(predictions / "scores.csv")
    decider = Decider.of(trained.results / "runs" / "single" / "first")
    assert set(table.category) == {"bolt"}
    assert set(table.category_by) == {"folder"}
    assert (table.width == 72).all()
    assert (table.height == 72).all()
    for row in table.itertuples():
        decision = decider.decide(row.image_score, "bolt")
        assert (row.decision, row.threshold) == (decision.verdict, pytest.approx(decision.threshold.value))
        assert row.p_value == pytest.approx(decision.p_value)
    coco = json.loads((predictions / "predictions.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == table.image.tolist()
    for n, row in enumerate(table.itertuples()):
        mine = [a for a in coco["annotations"] if a["image_id"] == n]
        assert sum(a["area"] for a in mine) == row.area
        assert [[*a["bbox"], a["area"]] for a in mine] == [region[:5] for region in json.loads(row.regions)]
        values = cv2.resize(np.load(next(predictions.glob(f"{n:06d}-*.npy"))), (72, 72))
        assert row.area == (values > decider.pixel_threshold("bolt").value).sum()
    text = (predictions / "predictions.html").read_text()
    assert text.count("<article") == len(table)
    assert text.count("data:image/jpeg") == 3 * len(table)
    assert 'src="http' not in text


def test_a_run_goes_by_its_name_and_an_unknown_one_is_told_apart(trained, monkeypatch, data_root, tmp_path):
    monkeypatch.chdir(trained.folder)
    record = Path("results/runs/single/first")
    assert find_run("first") == find_run("single/first") == record
    assert find_run(record) == find_run(record / "config.yaml") == record
    with pytest.raises(NoRunError, match=r"There is no run 'frist'\. Did you mean 'first'\? Known: first\."):
        find_run("frist")
    with pytest.raises(NoRunError, match=r"No run is named: give RUN=.* Known: first"):
        find_run("")
    with pytest.raises(NoRunError, match="holds no finished run yet: train one"):
        find_run("first", tmp_path)
    images = [data_root / "bolt" / "test" / "good" / f"{n:03d}.png" for n in range(2)]
    main(["predict", "--run=first", f"--images={images[0]} '{images[1]}'", f"--out={tmp_path / 'out'}"])
    assert pd.read_csv(tmp_path / "out" / "scores.csv").image.tolist() == list(map(str, images))


def test_images_are_folders_files_patterns_and_names_with_blanks(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c d.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert images_of(["a.png"]) == images_of(["a.*"]) == ["a.png"]
    assert images_of(["c d.png"]) == images_of(["'c d.png'"]) == ["c d.png"]
    assert images_of(["a.png b.png", str(tmp_path)]) == ["a.png", "b.png", str(tmp_path)]
    assert images_of(["[ab].png"]) == ["a.png", "b.png"]
    for word in ("e.png", "a.png e.png", "", "x'y"):
        with pytest.raises(FileNotFoundError, match="IMAGES"):
            images_of([word])


def test_the_category_that_is_given_decides_and_one_that_is_not_there_is_refused(trained, data_root, tmp_path):
    run = trained.results / "runs" / "single" / "first"
    image = tmp_path / "photo.png"
    shutil.copy(data_root / "disc" / "test" / "good" / "000.png", image)
    for given, expected in (("bolt", ("bolt", "CATEGORY")), (None, ("disc", "nearest"))):
        more = [f"--category={given}"] if given else []
        main(["predict", f"--run={run}", f"--images={image}", f"--out={tmp_path / str(given)}", *more])
        (row,) = pd.read_csv(tmp_path / str(given) / "scores.csv").itertuples()
        assert (row.category, row.category_by) == expected
    for options, words in (
        (["--category=blot"], "it has bolt, disc"),
        (["--alpha=0.01"], "0.01"),
        ([f"--out={image}"], "is a file"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["predict", f"--run={run}", f"--images={image}", *options])


def test_images_of_more_than_8_bits_get_the_scores_of_the_test_run(tmp_path, write_data, make_project):
    root = write_data(tmp_path / "data", masks=False)
    for path in root.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 16)
    project = make_project(tmp_path, root, "folder")
    project.run("--trainer.max_epochs=1")
    images, run = root / "bolt" / "test", project.results / "runs" / "single" / "first"
    main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={images}"])
    predicted = pd.read_csv(project.results / "work/single/first/predictions/scores.csv").set_index("image").image_score
    tested = pd.read_csv(run / "image_scores.csv").set_index("path").image_score
    assert predicted.to_dict() == pytest.approx(tested[predicted.index].to_dict(), rel=1e-5)


def test_the_same_images_again_take_the_earlier_files_place_and_others_go_beside_it(finished, data_root):
    project = finished
    work = project.results / "work" / "single" / "first"
    one = data_root / "bolt" / "test" / "good" / "000.png"
    for images, name, count in (
        (data_root / "bolt", "predictions", 11),  # masks are no images
        (data_root / "bolt", "predictions", 11),
        (one, "predictions-2", 1),
    ):
        project.run(f"--data.init_args.predict_root={images}", command="predict")
        folder = work / name
        assert len(pd.read_csv(folder / "scores.csv")) == count
        found = sorted(path.suffix for path in folder.iterdir())
        assert found == [".csv", ".html", *[".jpg"] * count, ".json", *[".npy"] * count]
    assert len(pd.read_csv(work / "predictions" / "scores.csv")) == 11
    assert not list(work.glob("*.new"))


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
    assert table.image_score.isna().sum() == 1
    assert table.decision[str(images / "broken.png")] == "cannot tell"
    assert "broken.png" in (folder / "predictions.html").read_text()
    assert table.image_score[os.fsdecode(name)] == pytest.approx(table.image_score[str(images / "0.png")])
    assert len(list(folder.glob("*.npy"))) == len(list(folder.glob("*.jpg"))) == 3
    (trained.results / "runs" / "single" / "bad").unlink()


def test_an_earlier_prediction_stays_until_the_new_one_is_complete(predictions, trained, data_root, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in predictions.iterdir()}
    monkeypatch.setattr("lightning_modules.prediction.place.replace", stop)
    run = trained.results / "runs" / "single" / "first"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(
            [
                "predict",
                f"--config={run / 'config.yaml'}",
                f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}",
            ]
        )
    assert {path.name: path.read_bytes() for path in predictions.iterdir()} == before


def test_an_unreadable_image_is_named(trained, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"not an image")
    run = trained.results / "runs" / "single" / "first"
    with pytest.raises(SystemExit, match=r"photo\.png"):
        main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={tmp_path}"])
