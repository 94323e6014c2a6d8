"""Shots and contamination: which images are trained and tested on, and that nothing tells the training of the defects."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import DataError, DatasetConfig, UnifiedDataModule
from datamodules.cache.entry import CacheSpec, open_or_build


@pytest.fixture(scope="module")
def root(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make.mvtec(folder, "bottle", train=20, normal=3, defects=6)
    make.mvtec(folder, "cable", train=10, normal=3, defects=4)
    return folder


def module(root, categories=None, **options):
    chosen = {"image_size": 16, "resize": "pil_bilinear", "batch_size": 4, "num_workers": 0} | options
    made = UnifiedDataModule([DatasetConfig("mvtec_ad", str(root), categories)], **chosen)
    made.setup()
    return made


def images(data, split, category):
    rows = data.table[(data.table.split == split) & (data.table.category == category)]
    return {str(Path(path).relative_to(Path(path).parents[2])) for path in rows.image_path}


def test_shots_are_so_many_of_each_category_and_fewer_are_among_more(root):
    few, more = (module(root, shots=k) for k in (2, 4))
    for category in ("bottle", "cable"):
        assert len(images(few, "train", category)) == 2
        assert images(few, "train", category) < images(more, "train", category)
        assert images(few, "test", category) == images(module(root), "test", category)
    assert sum(len(batch["id"]) for batch in few.train_images()) == 4


def test_shots_are_chosen_by_the_seed_alone(root):
    assert images(module(root, shots=3), "train", "bottle") == images(
        module(root, ["bottle"], shots=3), "train", "bottle"
    )
    others = [images(module(root, shots=3, seed=seed), "train", "bottle") for seed in range(1, 4)]
    assert any(other != images(module(root, shots=3), "train", "bottle") for other in others)


def test_held_out_images_are_never_shots(root):
    data = module(root, shots=2, holdout=0.2)
    assert [images(data, "val", category) for category in ("bottle", "cable")] == [
        images(module(root, holdout=0.2), "val", category) for category in ("bottle", "cable")
    ]
    assert data.remarks()[0] == "SHOTS: 2 training images per category, beside 6 held-out images"


def test_contamination_replaces_normal_images_by_defects_that_leave_the_test_set(root):
    data, clean = module(root, contamination=0.1), module(root)
    for category, defects in (("bottle", 2), ("cable", 1)):
        train = images(data, "train", category)
        assert len(train) == len(images(clean, "train", category))
        dirty = {path for path in train if "broken" in path}
        assert len(dirty) == defects
        assert images(data, "test", category) == images(clean, "test", category) - dirty
    assert data.remarks()[0].startswith("CONTAMINATION: 3 of 30 training images are defects of the test set")
    assert data.fingerprint == clean.fingerprint


def test_training_is_not_told_of_the_defects(root):
    data = module(root, contamination=0.2)
    batches = list(data.train_images())
    assert sum("broken" in path for batch in batches for path in batch["path"]) == 6
    for batch in batches:
        assert not batch["label"].any()
        assert not batch["mask"].any()
        assert set(batch["anomaly_type"]) == {"good"}


def test_cells_of_different_contamination_are_tested_on_the_same_images(root):
    cells = [module(root, contamination=p, contamination_reserved=0.2) for p in (0.0, 0.1, 0.2)]
    for category in ("bottle", "cable"):
        tested = [images(data, "test", category) for data in cells]
        assert tested[0] == tested[1] == tested[2]
        dirty = [{path for path in images(data, "train", category) if "broken" in path} for data in cells]
        assert [len(found) for found in dirty] == [0, len(dirty[2]) // 2, len(dirty[2])]
        assert dirty[1] < dirty[2]


def test_the_record_says_shots_and_contamination_of_each_dataset(root):
    assert "shots" not in module(root).provenance()[0]
    entry = module(root, shots=5, contamination=0.2).provenance()[0]
    assert (entry["shots"], entry["contamination"]) == (5, 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "at least 1"),
        ({"shots": 11}, "cable has 10 training images (after holdout), fewer than shots=11"),
        ({"contamination": 1.0}, "0 <= contamination < 1"),
        ({"contamination": 0.3}, "bottle: 0.3 of 20 training images are 6 defects, and the test set has 6"),
        ({"contamination": 0.01}, "less than half an image"),
        ({"contamination": 0.1, "contamination_reserved": 0.05}, "contamination_reserved"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(root, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        module(root, **options)


def test_a_cached_defect_is_masked_in_tests_and_unmarked_in_training(root, tmp_path):
    """The cache is filled from the files as they are, so that one entry serves every contamination."""
    data = module(root, contamination=0.2)

    def compute(first):
        for batch in data.all_images(first, 8):
            yield [batch["image"][:, :, ::8, ::8]], batch["mask"], None

    spec = CacheSpec(
        content=data.content(), image_size=data.image_size, resize=data.resize, backbone={"name": "none", "levels": [1]}
    )
    assert data.content() == module(root).content() == module(root, shots=2).content()
    cache = open_or_build(tmp_path, spec, len(data.table), compute, 2**30, lambda _: None)
    dirty = data.table[(data.table.split == "train") & (data.table.defect != "good")].id.tolist()
    assert all(cache.mask(number).any() for number in dirty)
    data.serve_from(cache, torch.device("cpu"), 0)
    assert not any(batch["mask"].any() for batch in data.train_images())
    clean = module(root)
    clean.serve_from(cache, torch.device("cpu"), 0)
    tested = {
        int(i): bool(m.any())
        for batch in clean.test_dataloader()
        for i, m in zip(batch["id"], batch["mask"], strict=True)
    }
    assert all(tested[number] for number in dirty)
    assert np.count_nonzero(list(tested.values())) == 10


def test_an_epoch_of_so_many_draws_makes_equally_many_steps_whatever_the_shots(root):
    for shots in (1, 4, None):
        data = module(root, shots=shots, epoch_images=12)
        drawn = [number for batch in data.train_dataloader() for number in batch["id"].tolist()]
        assert len(drawn) == 12
        if shots is not None:  # every image comes equally often, up to one
            counts = np.unique(drawn, return_counts=True)[1]
            assert len(counts) == 2 * shots
            assert counts.max() - counts.min() <= 1


def test_fewer_categories_are_the_first_of_those_named(root):
    assert module(root, category_count=1).categories == ["bottle"]
    assert module(root, ["cable", "bottle"], category_count=1).categories == ["cable"]
    assert module(root, category_count=2).categories == ["bottle", "cable"]
    with pytest.raises(DataError, match="category_count is 3, but only 2 categories"):
        module(root, category_count=3)
    with pytest.raises(DataError, match="epoch_images must be at least 1"):
        module(root, epoch_images=0)
