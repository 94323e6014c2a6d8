"""Features that are computed once give the training that features computed in every step give."""

from __future__ import annotations

import json

import albumentations
import numpy as np
import pytest
import torch

from datamodules import DatasetConfig, UnifiedDataModule
from datamodules.cache.folder import entries
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig

BACKBONE = BackboneConfig("test_efficientnet.r160_in1k", (1, 2, 3, 4), "random")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> UniAD:
    return UniAD(BACKBONE, image_size=64, d_model=16, heads=2, feedforward=32, neighbor_size=3).eval()


def data_module(root, categories=None, **options) -> UnifiedDataModule:
    datasets = [DatasetConfig("mvtec_ad", str(root), categories)]
    return UnifiedDataModule(datasets, 64, "pil_bilinear", batch_size=5, eval_batch_size=4, num_workers=0, **options)


def served(model, data, tmp_path, **options) -> UnifiedDataModule:
    attach(model, data, CacheConfig(root=str(tmp_path / "cache"), **options), CPU, build=True)
    return data


def test_training_with_cached_features_equals_training_without(finished):
    project, building = finished, "first"
    project.fit("--cache.mode=off", name="plain")
    project.fit(name="reading")
    assert project.losses(building) == project.losses("reading")
    np.testing.assert_allclose(project.losses(building), project.losses("plain"), rtol=1e-4)
    values = [project.record(name).metrics.value for name in ("plain", "reading")]
    np.testing.assert_allclose(*values, atol=2e-3)


def test_a_served_batch_is_the_batch_of_a_plain_run_with_its_features(model, data_root, tmp_path):
    plain, cached = data_module(data_root), served(model, data_module(data_root), tmp_path)
    plain.setup("fit")
    for loader in ("train_dataloader", "test_dataloader"):
        for expected, batch in zip(getattr(plain, loader)(), getattr(cached, loader)(), strict=True):
            for name in ("mask", "has_mask", "label", "id"):
                assert torch.equal(batch[name], expected[name]), name
                assert batch[name].dtype == expected[name].dtype
            for name in ("category", "dataset", "anomaly_type", "path"):
                assert batch[name] == expected[name]
            (features,) = batch["features"]
            (computed,) = model.features({"image": expected["image"]})
            torch.testing.assert_close(features, computed, rtol=1e-4, atol=1e-4)


def test_float32_features_are_those_of_the_backbone_bit_for_bit(model, data_root, tmp_path):
    data = served(model, data_module(data_root), tmp_path)
    (batch,) = data.all_images(0, 32)  # the batch that the cache was built with
    (computed,) = model.extract(batch["image"])
    assert np.array_equal(data._served.cache.levels[0], computed.numpy())


def test_float16_features_are_off_by_the_rounding_of_halves_only(model, data_root, tmp_path):
    exact = served(model, data_module(data_root), tmp_path)._served.cache.levels[0]
    half = served(model, data_module(data_root), tmp_path, mode="float16")._served.cache.levels[0]
    np.testing.assert_allclose(half.astype(np.float32), exact, rtol=2**-11, atol=2**-24)


def test_the_order_of_categories_does_not_mix_their_features(model, data_root, tmp_path):
    first = served(model, data_module(data_root, ("bolt", "disc")), tmp_path)
    second = served(model, data_module(data_root, ("disc", "bolt")), tmp_path)
    by_path = {}
    for data in (first, second):
        for batch in data.test_dataloader():
            for path, features in zip(batch["path"], batch["features"][0], strict=True):
                torch.testing.assert_close(features, by_path.setdefault(path, features), rtol=1e-4, atol=1e-4)
    assert len(by_path) == 10


def test_a_retouched_image_of_equal_size_is_not_served_from_the_old_features(model, tmp_path, write_data):
    root = write_data(tmp_path / "data", train=2)
    before = np.array(served(model, data_module(root), tmp_path)._served.cache.levels[0])
    victim = next((root / "bolt" / "train" / "good").iterdir())
    content = bytearray(victim.read_bytes())
    donor = next((root / "disc" / "train" / "good").iterdir()).read_bytes()
    victim.write_bytes(donor)
    after = served(model, data_module(root), tmp_path)._served.cache.levels[0]
    assert not np.array_equal(before, after)
    assert bytes(content) != donor


@pytest.fixture
def flipped(tmp_path, write_data):
    """A benchmark with one category that UniAS flips and turns and one that it leaves as it is."""
    root = write_data(tmp_path / "data", train=3)
    (root / "bolt").rename(root / "bottle")
    return root


@pytest.mark.parametrize("resident", [False, True])
def test_features_of_flipped_and_turned_images_are_cached_too(model, flipped, tmp_path, resident):
    options = {"augmentation": "unias_mvtec"}
    data, plain = served(model, data_module(flipped, **options), tmp_path), data_module(flipped, **options)
    plain.setup("fit")
    normal = sum(len(list((flipped / category / "train" / "good").iterdir())) for category in ("bottle", "disc"))
    turned = 7 * len(list((flipped / "bottle" / "train" / "good").iterdir()))
    assert len(data._served.cache.levels[0]) == len(plain.table) + turned
    if resident:
        needed = (normal + turned) * data._served.cache.levels[0][0].nbytes
        data.serve_from(data._served.cache, CPU, needed, data.symmetric_rows())
    seen = 0
    loader, expected_loader = data.train_dataloader(), plain.train_dataloader()
    assert (loader.dataset.resident is not None) == resident
    for epoch in range(4):
        loader.batch_sampler.set_epoch(epoch) if loader.batch_sampler else loader.sampler.set_epoch(epoch)
        expected_loader.sampler.set_epoch(epoch)
        for batch, expected in zip(loader, expected_loader, strict=True):
            for name in ("mask", "has_mask", "label", "id"):
                assert torch.equal(batch[name], expected[name]), name
            assert batch["path"] == expected["path"]
            (computed,) = model.features({"image": expected["image"]})
            torch.testing.assert_close(batch["features"][0], computed, rtol=1e-4, atol=1e-4)
            seen += len(batch["id"])
    assert seen == 4 * normal
    for batch, expected in zip(data.test_dataloader(), plain.test_dataloader(), strict=True):
        (computed,) = model.features({"image": expected["image"]})
        torch.testing.assert_close(batch["features"][0], computed, rtol=1e-4, atol=1e-4)


def test_an_entry_of_flipped_images_serves_every_holdout(model, flipped, tmp_path):
    options = {"augmentation": "unias_mvtec"}
    served(model, data_module(flipped, **options), tmp_path)
    data = served(model, data_module(flipped, holdout=0.4, **options), tmp_path)
    assert len(entries(tmp_path / "cache")) == 1
    plain = data_module(flipped, holdout=0.4, **options)
    plain.setup("fit")
    for batch, expected in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        (computed,) = model.features({"image": expected["image"]})
        torch.testing.assert_close(batch["features"][0], computed, rtol=1e-4, atol=1e-4)


def test_images_whose_colours_change_are_decoded_once_but_augmented_each_time(model, flipped, tmp_path, monkeypatch):
    policy = {"shades": lambda category: [albumentations.RandomBrightnessContrast(p=1.0)]}
    monkeypatch.setattr("datamodules.augmentation.AUGMENTATIONS", policy)
    options = {"augmentation": "shades"}
    root = flipped
    data, plain = served(model, data_module(root, **options), tmp_path), data_module(root, **options)
    plain.setup("fit")
    (entry,) = entries(tmp_path / "cache")
    assert entry.title.startswith("images")
    for batch, expected in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert "features" not in batch
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["mask"], expected["mask"])


def test_features_beyond_the_budget_leave_at_least_decoded_images(model, data_root, tmp_path):
    data = served(model, data_module(data_root), tmp_path, budget_gb=0.0005)  # images take 0.29 MB, features 0.18 MB
    assert data._served is not None
    large = BackboneConfig("test_efficientnet.r160_in1k", (1, 2, 3, 4), "random", seed=1)
    model = UniAD(large, image_size=64, grid=(16, 16), d_model=16, heads=2, neighbor_size=3)
    data = served(model, data_module(data_root), tmp_path / "other", budget_gb=0.0005)
    assert data._served is None
    assert [entry.title.split()[0] for entry in entries(tmp_path / "other" / "cache")] == ["images"]
    assert "image" in next(iter(data.train_dataloader()))


def test_without_room_for_anything_images_are_read_and_nothing_is_kept(model, data_root, tmp_path):
    data = served(model, data_module(data_root), tmp_path, budget_gb=1e-6)
    assert entries(tmp_path / "cache") == []
    assert "image" in next(iter(data.train_dataloader()))


def test_scoring_a_checkpoint_uses_an_entry_but_builds_none(trained, tmp_path):
    cache = tmp_path / "cache"
    trained.run(f"--cache.root={cache}", f"--ckpt_path={trained.checkpoint()}", command="test", name="uncached")
    assert entries(cache) == []
    values = [trained.record(name).metrics.value for name in ("first", "uncached")]
    np.testing.assert_allclose(*values, atol=2e-3)


def test_the_feature_caches_key_is_readable(model, data_root, tmp_path):
    data = served(model, data_module(data_root), tmp_path)
    meta = json.loads((data._served.cache.folder / "meta.json").read_text())
    assert meta["spec"]["backbone"]["levels"] == [1, 2, 3, 4]
    assert "concatenated" in meta["spec"]["preparation"]


def test_features_that_live_on_the_device_are_those_on_disk(model, data_root, tmp_path):
    """What fits is copied once per split, and an epoch is then a choice of rows without workers."""
    disk, resident = (served(model, data_module(data_root), tmp_path) for _ in range(2))
    needed = 12 * disk._served.cache.levels[0][0].nbytes
    resident.serve_from(
        resident._served.cache, CPU, needed
    )  # room for the training images, not for the test images too
    for name, is_resident in (("train_dataloader", True), ("test_dataloader", False)):
        loader = getattr(resident, name)()
        assert (loader.dataset.resident is not None) == is_resident
        assert loader.num_workers == 0
        for expected, batch in zip(getattr(disk, name)(), loader, strict=True):
            assert torch.equal(batch["features"][0], expected["features"][0])
            for values in ("id", "mask"):
                assert torch.equal(batch[values], expected[values])
