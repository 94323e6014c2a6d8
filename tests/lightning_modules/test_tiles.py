"""Tiles of a photograph are scored by themselves, their maps stitched; who cannot have tiles is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.dataset import normalised_levels
from datamodules.tiled import TiledPhotograph
from datamodules.tiling import TileConfig
from lightning_modules.running import refusals
from lightning_modules.stitching import of_photograph
from models.head import ScoredMaps
from results.common.deciding import deciding


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


def test_runs_without_tiles_keep_their_names():
    options = {"data": {"init_args": {"image_size": 64}}}
    with_none = {"data": {"init_args": {"image_size": 64, "tiles": None}}}
    assert deciding(options) == deciding(with_none)
    with_some = {"data": {"init_args": {"image_size": 64, "tiles": {"size": 48, "grid": None, "overlap": 0.25}}}}
    assert deciding(options) != deciding(with_some)
