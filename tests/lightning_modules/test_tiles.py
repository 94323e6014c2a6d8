"""Runs on photographs in tiles: trained on tiles, scored by stitched maps at the photograph's own size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datamodules.dataset import normalised_levels
from datamodules.errors import DataError
from datamodules.tiled import TiledPhotograph
from datamodules.tiling import TileConfig
from lightning_modules import load_run
from lightning_modules.exporting.graph import Scorer
from lightning_modules.running import refusals
from lightning_modules.running.command_line import main
from lightning_modules.stitching import of_photograph
from lightning_modules.ulsad import ULSAD
from models.head import ScoredMaps
from results.common.deciding import deciding

SIDE = 72
"""Of the photographs, which `conftest.write_dataset` makes."""
TILES = "--data.init_args.tiles.size=48"


def brightness(batch):
    """A method whose map is the mean of the channels, and whose score is the map's highest value."""
    maps = batch["image"].mean(1)
    return {"": ScoredMaps(maps, maps.flatten(1).amax(1), [maps])}


def photograph(pixels, config, size=(32, 32), at_once=3):
    return TiledPhotograph(pixels, config, size, "pil_bilinear", normalised_levels((0, 0, 0), (1, 1, 1)), at_once)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_a_defect_is_found_where_it_is_also_where_tiles_overlap(overlap):
    pixels = np.zeros((96, 128, 3), np.uint8)
    config = TileConfig(size=32, overlap=overlap)
    for top, left in ((0, 0), (22, 22), (30, 61), (88, 120)):
        pixels[:] = 0
        pixels[top : top + 8, left : left + 8] = 255
        scored = of_photograph(brightness, photograph(pixels, config), torch.device("cpu"))
        assert scored.maps.shape == (1, 96, 128)
        # Tiles have the network's size, so that the map is the photograph itself.
        torch.testing.assert_close(scored.maps[0], torch.from_numpy(pixels[..., 0] / 255).float())
        assert scored.image_scores.tolist() == pytest.approx([1.0])


def test_the_score_is_the_highest_of_all_chunks_of_tiles():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = 200  # in the first of four chunks
    for at_once in (1, 2, 100):
        made = photograph(pixels, TileConfig(size=16, overlap=0.0), at_once=at_once)
        assert of_photograph(brightness, made, torch.device("cpu")).image_scores.tolist() == pytest.approx([200 / 255])


def test_methods_that_need_whole_photographs_are_refused():
    data = SimpleNamespace(tiles=TileConfig(grid=(2, 2)))
    whole = SimpleNamespace(method="ulsad", untiled="its global autoencoder ...")
    with pytest.raises(SystemExit, match="tiles does not go with ulsad: its global autoencoder"):
        refusals.tiles(whole, data)
    refusals.tiles(whole, SimpleNamespace(tiles=None))
    refusals.tiles(SimpleNamespace(method="uniad", untiled=""), data)


def test_ulsad_without_its_global_branch_takes_tiles():
    from models.backbones import BackboneConfig

    backbone = BackboneConfig("test_efficientnet.r160_in1k", (2, 3), "random", "default")
    assert "global autoencoder" in ULSAD(backbone, image_size=64, pooled_channels=16).untiled
    assert not ULSAD(backbone, image_size=64, pooled_channels=16, terms=("pl",), global_map="none").untiled


def test_runs_without_tiles_keep_their_names():
    options = {"data": {"init_args": {"image_size": 64}}}
    with_none = {"data": {"init_args": {"image_size": 64, "tiles": None}}}
    assert deciding(options) == deciding(with_none)
    with_some = {"data": {"init_args": {"image_size": 64, "tiles": {"size": 48, "grid": None, "overlap": 0.25}}}}
    assert deciding(options) != deciding(with_some)


# ---- a run ---------------------------------------------------------------------------------------------------------------


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
