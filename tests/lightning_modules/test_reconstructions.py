"""From a finished run to the figure of what it reconstructs."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from datamodules import DatasetConfig, UnifiedDataModule
from lightning_modules.pictures import pipeline, reconstructions
from lightning_modules.rlr import RLR
from lightning_modules.running.settings import work_folder
from models.backbones import BackboneConfig
from results.aggregator.records import METRIC_COLUMNS, RunRecord, write_record


@pytest.fixture
def run(tmp_path):
    """A finished run on two categories of 64x64 images, as the command line leaves it, and its module."""
    rng = np.random.default_rng(0)
    for category in ("nut", "tile"):
        for kind, count in (("train/good", 3), ("test/good", 2), ("test/hole", 3)):
            folder = tmp_path / "data" / category / kind
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
    model = {
        "class_path": "lightning_modules.rlr.RLR",
        "init_args": {
            "backbone": {"name": "test_efficientnet.r160_in1k", "levels": [3, 4], "weights": "random"},
            "image_size": 128,
            "widths": [16, 16],
            "layers": 1,
            "heads": 2,
        },
    }
    data = {
        "class_path": "datamodules.UnifiedDataModule",
        "init_args": {
            "datasets": [{"name": "folder", "root": str(tmp_path / "data")}],
            "image_size": 128,
            "resize": "pil_lanczos",
            "batch_size": 3,
        },
    }
    torch.manual_seed(0)
    module = RLR(BackboneConfig("test_efficientnet.r160_in1k", (3, 4), weights="random"), image_size=128,
                 widths=[16, 16], layers=1, heads=2)  # fmt: skip
    state = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    work = tmp_path / "results" / "work" / "single" / "mine" / "checkpoints"
    work.mkdir(parents=True)
    torch.save(state, work / "last.ckpt")
    images = UnifiedDataModule([DatasetConfig("folder", str(tmp_path / "data"))], 128, "pil_lanczos", 3)
    images.setup("fit")
    test = images.table[images.table.split == "test"]
    scores = pd.DataFrame(
        {"id": test.id, "category": test.category, "label": test.label, "image_score": rng.random(len(test))}
    )
    record = RunRecord(
        run="mine",
        sweep="single",
        cell={},
        method="rlr",
        profile="custom",
        protocol="clean",
        setting="unified",
        seed=0,
        image_size=(128, 128),
        resize="pil_lanczos",
        backbone=module.extractor.provenance,
        datasets=[{"name": "folder", "fingerprint": images.fingerprint, "categories": ["nut", "tile"]}],
        metrics={"version": "0"},
    )
    folder = write_record(
        tmp_path / "results" / "runs",
        record,
        pd.DataFrame([("", "mean", "folder", "", "image_auroc", 0.5, 2, "")], columns=METRIC_COLUMNS),
        pd.DataFrame(columns=["epoch", "step", "metric", "value"]),
        yaml.safe_dump({"model": model, "data": data, "cache": {"root": str(tmp_path / "cache")}}),
        attachments={"image_scores.csv": scores.to_csv(index=False)},
    )
    return folder, module


def test_a_run_comes_back_from_its_folder_with_the_weights_it_was_trained_to(run):
    folder, module = run
    loaded, data = reconstructions.trained(folder)
    images = data.image_batch([0, 1])["image"]
    with torch.no_grad():
        assert torch.equal(loaded(images).maps, module.eval()(images).maps)


@pytest.mark.program
def test_the_figure_has_a_row_per_category_and_the_decoder_is_trained_once_unless_damaged(run, capsys):
    folder, _ = run
    arguments = [str(folder), "--epochs=1", "--width=16"]
    reconstructions.main(arguments)
    assert "mean squared error" in capsys.readouterr().out
    work = work_folder(folder)
    first = (work / "reconstructions.jpg").read_bytes()
    width, height = Image.open(io.BytesIO(first)).size
    assert 2 < width / height < 3.5  # six columns, two rows
    reconstructions.main(arguments)
    assert "mean squared error" not in capsys.readouterr().out
    assert (work / "reconstructions.jpg").read_bytes() == first
    (work / "visual_decoder" / "last.ckpt").write_bytes(b"")
    reconstructions.main(arguments)
    assert "mean squared error" in capsys.readouterr().out


@pytest.mark.program
def test_a_decoder_that_was_interrupted_goes_on_to_the_same_weights(run):
    folder, _ = run
    file = work_folder(folder) / "visual_decoder" / "last.ckpt"

    def weights(epochs: int) -> dict:
        reconstructions.main([str(folder), f"--epochs={epochs}", "--width=16"])
        return torch.load(file, weights_only=False)["state_dict"]

    weights(1)
    resumed = weights(2)
    file.unlink()
    whole = weights(2)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_median_image_of_each_kind_is_shown():
    scores = pd.DataFrame(
        [(0, "a", 0, 0.1), (1, "a", 0, 0.9), (2, "a", 0, 0.2), (3, "a", 1, 0.7), (4, "b", 1, 0.3)],
        columns=["id", "category", "label", "image_score"],
    )
    table = pd.DataFrame({"id": [7, 8], "dataset": "d", "category": ["a", "b"], "split": "train"})
    assert reconstructions.choose(scores, table) == {"a": (2, 3), "b": (8, 4)}


def test_a_training_image_stands_in_for_its_own_data_set_only():
    scores = pd.DataFrame([(4, "autumn/wood", 1, 0.3)], columns=["id", "category", "label", "image_score"])
    table = pd.DataFrame({"id": [7, 8], "dataset": ["spring", "autumn"], "category": "wood", "split": "train"})
    assert reconstructions.choose(scores, table) == {"autumn/wood": (8, 4)}


def test_a_run_whose_images_changed_is_refused(run, tmp_path):
    folder, _ = run
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "nut" / "train" / "good" / "9.png")
    with pytest.raises(ValueError, match="changed since the run"):
        reconstructions.trained(folder)


def test_a_run_without_its_checkpoint_says_what_is_missing(run):
    folder, _ = run
    (work_folder(folder) / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        reconstructions.trained(folder)


def test_a_mistyped_category_is_refused(run, capsys):
    folder, _ = run
    with pytest.raises(SystemExit):
        reconstructions.main([str(folder), "--categories=nutt"])
    assert "nut, tile" in capsys.readouterr().err


def test_a_folder_without_record_is_refused_in_plain_words(tmp_path):
    with pytest.raises(SystemExit, match="no record"):
        reconstructions.main([str(tmp_path)])


@pytest.mark.parametrize("content", [b"", b"cut off", None])
def test_of_damaged_weights_the_ones_before_are_used_and_without_them_a_sentence_is_all(run, content, capsys):
    folder, module = run
    last = reconstructions.work_folder(folder) / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    if content is None:
        torch.save({"model": torch.zeros(3)}, last)
    else:
        last.write_bytes(content)
    with pytest.raises(SystemExit, match=r"last\.ckpt cannot be read as a checkpoint"):
        reconstructions.main([str(folder)])
    last.with_name("previous.ckpt").write_bytes(whole)
    loaded, _ = reconstructions.trained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))


def test_the_way_from_photograph_to_table_is_drawn_from_a_run(run, capsys):
    folder, _ = run
    pipeline.main([str(folder), "--image=3"])
    file = capsys.readouterr().out.strip().splitlines()[-1]
    assert Image.open(file).size == (1320, 396)
    with pytest.raises(SystemExit, match="no test image 99"):
        pipeline.main([str(folder), "--image=99"])


def test_colours_are_the_targets_principal_components_for_both():
    rng = np.random.default_rng(0)
    target, other = (
        torch.from_numpy(rng.normal(size=(5, 4, 6)) * np.arange(5, 0, -1)[:, None, None]) for _ in range(2)
    )
    first, second = pipeline.coloured(target, other)
    flat = target.flatten(1).T.numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    for shown, features in ((first, target), (second, other)):
        for channel, axis in enumerate(vectors[:, np.argsort(values)[::-1][:3]].T):
            own = (flat - flat.mean(0)) @ axis
            expected = np.clip(((features.flatten(1).T.numpy() - flat.mean(0)) @ axis - np.quantile(own, 0.01))
                               / (np.quantile(own, 0.99) - np.quantile(own, 0.01)), 0, 1) * 255  # fmt: skip
            found = shown[..., channel].reshape(-1).astype(float)
            # An axis has no sign: turned round, the scale is too. Values are cut to whole steps.
            assert min(np.abs(found - expected).max(), np.abs(found - (255 - expected)).max()) <= 1
