"""Runs on photographs in tiles: trained on tiles, scored by stitched maps at the photograph's own size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from lightning_modules import load_run
from lightning_modules.exporting.graph import Scorer
from lightning_modules.running.command_line import main
from lightning_modules.ulsad import ULSAD
from models.backbones import BackboneConfig

pytestmark = pytest.mark.program  # several trainings
SIDE = 72
"""Of the photographs, which `conftest.write_dataset` makes."""
TILES = "--data.init_args.tiles.size=48"


@pytest.fixture(scope="module")
def tiled(make_project, data_root, tmp_path_factory):
    torch.set_num_threads(1)
    project = make_project(tmp_path_factory.mktemp("tiled"), data_root)
    project.run("--trainer.max_epochs=1", "--run.heatmaps=true", "--data.init_args.holdout=0.4", TILES, name="tiled")
    return project


def test_record_says_how_photographs_are_cut_and_maps_have_their_size(tiled):
    stored = tiled.record("tiled")
    assert stored.record.resize == "pil_bilinear, tiles of 48x48, overlap 0.25"
    (note,) = [note for note in stored.record.notes if "stitched" in note]
    assert "8 training images make 32 tiles" in note
    assert len(stored.heatmaps) > 0
    assert len(tiled.losses("tiled")) == 1


def test_predict_and_load_run_score_as_the_test_does(tiled):
    folder = tiled.results / "runs/single/tiled"
    main(["predict", f"--config={folder / 'config.yaml'}", f"--data.init_args.predict_root={tiled.data / 'bolt/test'}"])
    place = tiled.results / "work/single/tiled/predictions"
    predicted = pd.read_csv(place / "scores.csv").set_index("image")
    expected = pd.read_csv(folder / "image_scores.csv").set_index("path").image_score[predicted.index]
    np.testing.assert_allclose(predicted.image_score, expected, rtol=1e-5)
    assert set(predicted.width) == {SIDE}
    maps = {file: np.load(file) for file in sorted(place.glob("*.npy"))}
    assert {values.shape for values in maps.values()} == {(SIDE, SIDE)}
    model = load_run(folder)
    scored = model(list(predicted.index))
    np.testing.assert_allclose(scored.image_scores.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(scored.maps.numpy(), np.stack(list(maps.values())), rtol=1e-4, atol=1e-6)
    with pytest.raises(DataError, match="72 x 72 and of 40 x 60"):
        model([predicted.index[0], Image.new("RGB", (40, 60))])
    with pytest.raises(ValueError, match="cannot be exported: it scores tiles of 48x48"):
        Scorer(model)


def test_cached_and_computed_features_are_of_the_same_tiles(tiled):
    options = ("--trainer.max_epochs=1", "--data.init_args.holdout=0.4", TILES, "--cache.mode=off")
    tiled.run(*options, name="computed")
    assert tiled.losses("computed") == pytest.approx(tiled.losses("tiled"), rel=1e-5)


def test_one_tile_of_a_whole_photograph_is_a_run_without_tiles(tiled):
    tiled.run("--trainer.max_epochs=1", "--data.init_args.tiles.grid=[1,1]", name="one")
    tiled.run("--trainer.max_epochs=1", name="none")
    assert tiled.losses("one") == tiled.losses("none")
    one, none = (
        pd.read_csv(tiled.results / f"runs/single/{name}/image_scores.csv").set_index("path").image_score
        for name in ("one", "none")
    )
    np.testing.assert_allclose(one[none.index], none, rtol=1e-5)  # batches of other sizes are summed in another order


def test_ulsad_without_its_global_branch_takes_tiles():
    backbone = BackboneConfig("test_efficientnet.r160_in1k", (2, 3), "random", "default")
    assert "global autoencoder" in ULSAD(backbone, image_size=64, pooled_channels=16).untiled
    assert not ULSAD(backbone, image_size=64, pooled_channels=16, terms=("pl",), global_map="none").untiled
