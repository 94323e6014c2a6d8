"""Photographs in tiles: where they are cut, how their maps become one, and what a data module makes of them."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from datamodules.images import shown_size
from datamodules.tiling import Canvas, TileConfig, Tiling, cut

CONFIGS = [
    TileConfig(size=16, overlap=0.0),
    TileConfig(size=16, overlap=0.25),
    TileConfig(size=(9, 30), overlap=0.5),
    TileConfig(grid=(1, 1)),
    TileConfig(grid=(3, 4), overlap=0.0),
    TileConfig(grid=(2, 5), overlap=0.4),
]
SIZES = [(40, 56), (16, 16), (7, 33), (31, 64)]


def stitched(tiling, maps):
    canvas = Canvas(tiling)
    for number, values in enumerate(maps):
        canvas.add(number, values)
    return canvas.map


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_cover_a_photograph_with_the_overlap_that_was_asked_for(config, size):
    tiling = Tiling(size, config)
    seen = np.zeros(size, int)
    for box in tiling.boxes:
        assert box.of(seen).shape == (box.height, box.width), "a tile reaches beyond the photograph"
        box.of(seen)[:] += 1
    assert seen.min() >= 1
    for side in tiling.cuts:
        shared = [before + side.extent - after for before, after in zip(side.starts, side.starts[1:], strict=False)]
        assert all(pixels >= math.floor(config.overlap * side.extent) for pixels in shared)
    if config.grid:
        assert len(tiling.boxes) == config.grid[0] * config.grid[1]
    else:
        assert {(box.height, box.width) for box in tiling.boxes} == {tuple(map(min, config.size, size))}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stitching_is_the_weighted_mean_of_a_slow_reference(config, size):
    """The reference: per pixel the mean of its tiles' values by the weights of their distance to the edges they share."""
    tiling = Tiling(size, config)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(box.height, box.width, generator=generator) for box in tiling.boxes]

    def ramp(side, number, place):
        weight = 1.0
        if number and (shared := side.starts[number - 1] + side.extent - side.starts[number]) > 0:
            weight = min(weight, (place - side.starts[number] + 0.5) / shared)
        if (
            number + 1 < len(side.starts)
            and (shared := side.starts[number] + side.extent - side.starts[number + 1]) > 0
        ):
            weight = min(weight, (side.starts[number] + side.extent - place - 0.5) / shared)
        return weight

    down, across = tiling.cuts
    expected = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            over = total = 0.0
            for number, (box, values) in enumerate(zip(tiling.boxes, maps, strict=True)):
                if box.top <= y < box.top + box.height and box.left <= x < box.left + box.width:
                    row, column = divmod(number, len(across.starts))
                    weight = ramp(down, row, y) * ramp(across, column, x)
                    over, total = over + weight * values[y - box.top, x - box.left].item(), total + weight
            expected[y, x] = over / total
    np.testing.assert_allclose(stitched(tiling, maps).numpy(), expected, rtol=0, atol=1e-5)  # float32 sums of a few


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_constant_map_stays_constant_and_a_gradient_has_no_seam(config):
    tiling = Tiling((40, 56), config)
    constant = stitched(tiling, [torch.full((8, 8), 3.0)] * len(tiling.boxes))  # tiles' maps of another size
    torch.testing.assert_close(constant, torch.full((40, 56), 3.0))
    plane = np.add.outer(np.arange(40.0), 2 * np.arange(56.0)).astype(np.float32)
    torch.testing.assert_close(
        stitched(tiling, [torch.from_numpy(box.of(plane)) for box in tiling.boxes]), torch.from_numpy(plane)
    )


def test_tiles_that_disagree_meet_without_a_step_unless_nothing_overlaps():
    """Two tiles of 0 and 1: the largest step is a pixel's share of the overlap, or all of it."""
    for overlap, steps in ((0.5, 1 / 20), (0.0, 1.0)):
        tiling = Tiling((8, 60 if overlap else 80), TileConfig(size=(8, 40), overlap=overlap))
        assert len(tiling.boxes) == 2
        line = stitched(tiling, [torch.zeros(8, 40), torch.ones(8, 40)])[0]
        assert line.diff().max().item() == pytest.approx(steps, rel=1e-5)
        assert (line[0], line[-1]) == (0, 1)


def test_one_tile_gives_its_own_map_bit_by_bit():
    values = torch.randn(33, 47, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stitched(Tiling((33, 47), TileConfig(grid=(1, 1), overlap=0.5)), [values]), values)
    assert torch.equal(stitched(Tiling((33, 47), TileConfig(size=64)), [values]), values)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give one of them"),
        ({"grid": (2, 2), "size": 100}, "give one of them"),
        ({"grid": (0, 2)}, "at least 1"),
        ({"size": 0}, "at least 1"),
        ({"size": 10, "overlap": 0.6}, "from 0 to 0.5"),
        ({"size": 10, "overlap": -0.1}, "from 0 to 0.5"),
    ],
)
def test_impossible_tiles_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        TileConfig(**options)


def test_more_tiles_than_pixels_are_refused():
    with pytest.raises(DataError, match="5 tiles do not fit into 4 pixels"):
        cut(4, 0.25, count=5)


# ---- the data module -----------------------------------------------------------------------------------------------------


def module(root, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    made = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root))], **chosen)
    made.setup()
    return made


@pytest.fixture
def root(make, tmp_path):
    """Ten training and six test photographs, two of each of another size."""
    make.mvtec(tmp_path, train=10)
    base = tmp_path / "bottle"
    for path in ("train/good/000", "train/good/001", "test/good/000", "test/broken/000"):
        make.image(base / f"{path}.png", size=(80, 64), seed=9)
    mask = np.zeros((80, 64), np.uint8)
    mask[30:36, 40:50] = 255
    assert cv2.imwrite(str(base / "ground_truth/broken/000_mask.png"), mask)
    return tmp_path


def test_training_counts_tiles_and_splits_count_photographs(root):
    data = module(root, tiles=TileConfig(size=32, overlap=0.25), holdout=0.2)
    train, val = ([row.image_path for row in data._samples(split)] for split in ("train", "val"))
    expected = {path: len(Tiling(shown_size(path), data.tiles).boxes) for path in data.table["image_path"]}
    assert {path: train.count(path) for path in set(train)} == {
        path: expected[path] for path in data.table[data.table["split"] == "train"]["image_path"]
    }
    assert (len(set(train)), len(set(val))) == (8, 2)
    assert not set(train) & set(val)
    assert data.training_samples == len(train) == len(data.train_dataloader().dataset)
    drawn = [draw.row for draw in data.train_dataloader().sampler]
    assert sorted(drawn) == list(range(len(train))), "an epoch draws each tile once"
    ids = [
        i for loader in (data.train_images(), data.val_dataloader()) for batch in loader for i in batch["id"].tolist()
    ]
    assert len(set(ids)) == len(train) + len(val)
    few = module(root, tiles=TileConfig(size=32, overlap=0.25), shots=3)
    assert len({row.image_path for row in few._samples("train")}) == 3


def test_a_training_tile_is_that_part_of_its_photograph_resized(root):
    data = module(root, tiles=TileConfig(size=24, overlap=0.5), mean=(0, 0, 0), std=(1, 1, 1))
    rows = data._samples("train")
    batches = list(data.train_images())
    images = torch.cat([batch["image"] for batch in batches])
    for place in (0, 7, len(rows) - 1):
        top, left, height, width = rows[place].tile
        whole = Image.open(rows[place].image_path).convert("RGB")
        part = whole.crop((left, top, left + width, top + height)).resize((16, 16), Image.BILINEAR)
        torch.testing.assert_close(images[place], torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1) / 255)


def test_photographs_of_several_sizes_are_tested_whole_and_one_by_one(root):
    data = module(root, tiles=TileConfig(grid=(2, 3)))
    batches = list(data.test_dataloader())
    assert len(batches) == len(data.table[data.table["split"] == "test"])
    for batch in batches:
        size = shown_size(batch["path"][0])
        assert batch["mask"].shape == (1, 1, *size)
        assert batch["image"].shape == (1, 3, 16, 16)
        (photograph,) = batch["tiles"]
        assert photograph.pixels.shape == (*size, 3)
        assert sum(len(images) for _, images in photograph.chunks()) == 6
    marked = next(batch for batch in batches if batch["path"][0].endswith("broken/000.png"))
    assert marked["mask"].sum() == 60
    assert {batch["mask"].shape for batch in batches} == {(1, 1, 80, 64), (1, 1, *shown_size(batches[1]["path"][0]))}


def test_a_chunk_holds_so_many_tiles_at_most(root):
    data = module(root, tiles=TileConfig(size=16), eval_batch_size=5)
    (photograph,) = next(iter(data.test_dataloader()))["tiles"]
    sizes = [len(images) for _, images in photograph.chunks()]
    assert max(sizes) == 5
    assert sum(sizes) == len(photograph.boxes)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"crop_from": 20}, "do not go together"), ({"mask_resize": "area"}, "keep their own size")],
)
def test_what_tiles_do_not_go_with_is_refused(root, options, told):
    with pytest.raises(DataError, match=told):
        module(root, tiles=TileConfig(grid=(2, 2)), **options)


def test_a_photograph_too_small_for_its_tiles_is_named(root):
    with pytest.raises(DataError, match=r"good/0\d\d.png: 100 tiles do not fit"):
        module(root, tiles=TileConfig(grid=(100, 1)))


@pytest.mark.parametrize("size", [(40, 32), (64, 80)])
def test_a_mask_of_another_size_than_its_photograph_is_refused_before_the_training(root, size):
    assert cv2.imwrite(str(root / "bottle/ground_truth/broken/000_mask.png"), np.full(size, 255, np.uint8))
    data = module(root, tiles=TileConfig(size=32))
    with pytest.raises(DataError, match=rf"000_mask.png: mask is {size[1]} x {size[0]} .* is 64 x 80"):
        data.remarks()


def test_a_test_photograph_too_small_for_its_tiles_is_refused_before_the_training(root):
    assert cv2.imwrite(str(root / "bottle/test/good/001.png"), np.zeros((5, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"test/good/001.png: 6 tiles do not fit into 5 pixels"):
        module(root, tiles=TileConfig(grid=(6, 1))).remarks()


def test_all_folds_share_the_cached_features_of_their_tiles(root):
    whole, *folds = (module(root, tiles=TileConfig(size=32), fold=fold) for fold in (None, (1, 3), (2, 3)))
    for fold in folds:
        assert fold.content() == whole.content()
        assert fold.cached_rows() == whole.cached_rows()
        (batch,) = fold.scored_batches([int(fold._normal_rows()[0].id)])
        assert "tiles" in batch


def test_batches_of_chosen_images_are_refused_where_none_is_an_image(root):
    with pytest.raises(DataError, match="2 x 2 tiles"):
        module(root, tiles=TileConfig(grid=(2, 2))).image_batch([0])


def test_exif_orientation_turns_the_size(tmp_path):
    for orientation, size in ((1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
        assert shown_size(tmp_path / "a.jpg") == size
