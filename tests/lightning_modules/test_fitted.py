"""Methods that are fitted in one pass, and reverse distillation, from photographs to a record."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from lightning_modules.fitted import PatchStore
from lightning_modules.metrics.sync import Group
from lightning_modules.patchcore import PatchCore
from lightning_modules.pictures import reconstructions
from lightning_modules.rd4ad import RD4AD
from models.backbones import BackboneConfig

BACKBONE = {"name": "test_efficientnet.r160_in1k", "weights": "random", "padding": "default"}
METHODS = {
    "patchcore": ("patchcore.PatchCore", (3, 4), {"coreset": {"ratio": 0.2}}),
    "padim": ("padim.PaDiM", (2, 3, 4), {"kept": 8}),
    "anomaly_dino": ("anomaly_dino.AnomalyDINO", (4,), {}),
    "rad": ("rad.RAD", (3, 4), {}),
    "rd4ad": (
        "rd4ad.RD4AD",
        (2, 3, 4),
        {"block": "basic", "embedding_blocks": 1, "decoder_blocks": [1, 1, 1]},
    ),
}
FITTED = [name for name in METHODS if name != "rd4ad"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def configured(project, method: str):
    path, levels, options = METHODS[method]
    backbone = {**BACKBONE, "levels": list(levels)}
    return project.use(path, trainer={"max_epochs": None}, backbone=backbone, image_size=64, **options)  # the recipe's


@pytest.fixture
def fitted(trained_once):
    return partial(trained_once, configure=configured)


def fit_of(project, name: str = "first") -> dict[str, torch.Tensor]:
    return {key: value for key, value in project.weights(name).items() if key.startswith("network.")}


@pytest.mark.parametrize("method", FITTED)
def test_one_pass_leaves_a_record_whose_checkpoint_holds_the_fit(fitted, method):
    project = fitted(method)
    record = project.record()
    assert record.record.method == method
    assert record.record.provenance["epochs"] == 1
    assert record.record.parameters["trainable"] == 0
    assert {"image_auroc", "pixel_auroc", "pixel_aupro"} <= set(record.metrics.metric)
    before = record.metrics
    project.run(f"--ckpt_path={project.checkpoint()}", "--run.overwrite=true", command="test", name="again")
    pd.testing.assert_frame_equal(project.record("again").metrics, before)


@pytest.mark.parametrize("method", FITTED)
def test_fit_with_cached_features_is_the_fit_without(fitted, method):
    project = fitted(method)
    project.run("--cache.mode=off", name="plain")
    for key, value in fit_of(project, "plain").items():
        # Features in other batches differ by rounding; the same vectors are chosen, and stand in the same order.
        torch.testing.assert_close(value, fit_of(project)[key], rtol=1e-3, atol=1e-3)


def test_a_longer_training_is_refused(fitted):
    with pytest.raises((SystemExit, ValueError), match="max_epochs must be 1, found 2"):
        fitted("padim").run("--trainer.max_epochs=2", name="long")


@pytest.mark.parametrize("method", ["patchcore", pytest.param("padim", marks=pytest.mark.program)])
def test_one_model_per_category(fitted, method):
    project = fitted(method)
    project.run("--data.init_args.setting=per_category", name="each")
    record = project.record("each")
    assert record.record.setting == "per_category"
    assert set(record.metrics[record.metrics.scope == "category"].category) == {"bolt", "disc"}


def test_predict_and_heat_maps_work_and_reconstructions_are_refused_in_a_sentence(fitted, data_root):
    project = fitted("patchcore")
    images = data_root / "bolt" / "test"
    project.run(f"--data.init_args.predict_root={images}", command="predict")
    scores = next((project.results / "work" / "single" / "first" / "predictions").rglob("*.csv"))
    assert len(pd.read_csv(scores)) == 5
    with pytest.raises(SystemExit, match="patchcore does not reconstruct anything, so there is nothing to draw"):
        reconstructions.main([str(project.results / "runs" / "single" / "first")])


def test_images_that_are_drawn_in_another_order_give_the_same_bank(fitted):
    project = fitted("patchcore")
    project.run("--data.init_args.batch_size=3", name="other")
    for key, value in fit_of(project, "other").items():
        assert torch.equal(value, fit_of(project)[key])


def test_vectors_beyond_the_memory_go_through_a_file_that_is_gone_afterwards(fitted):
    project = fitted("patchcore")
    project.run("--model.init_args.memory_gb=0", name="mapped")
    for key, value in fit_of(project, "mapped").items():
        assert torch.equal(value, fit_of(project)[key])
    assert not list(project.results.rglob("patches-*"))


def test_the_record_says_what_the_bank_is(fitted):
    project = fitted("patchcore")
    project.run("--model.init_args.coreset.share=per_category", name="shares")
    notes = json.dumps(project.record("shares").record.notes)
    grid = 8 * 8  # level 3 at 64 pixels, stride 8
    kept = 2 * int(6 * grid * 0.2)
    assert len(fit_of(project, "shares")["network.bank.vectors"]) == kept
    assert "equal share per category (training labels)" in notes
    assert f"memory bank of {kept}" in notes
    assert "rule released, image score patch_max" in notes


def test_anomalibs_rule_changes_border_and_score():
    backbone = BackboneConfig("test_efficientnet.r160_in1k", (3, 4), weights="random")
    net = PatchCore(backbone, image_size=64, rule="anomalib").eval()
    assert net.head.config.smoothing_border == "reflect"
    assert PatchCore(backbone, image_size=64).head.config.smoothing_border == "symmetric"
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (features,) = net.features({"image": images})
    net.network.bank.set(features[:2].permute(0, 2, 3, 1).flatten(0, 2))
    scored = net(images)
    assert scored.maps.shape == (3, 64, 64)
    assert scored.level_maps[0].shape == features.shape[:1] + features.shape[2:]
    assert (scored.image_scores[:2] < 1e-6).all()
    assert scored.image_scores[2] > 0


def test_rd4ad_trains_with_the_released_optimiser(uncalibrated):
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        net = RD4AD(BackboneConfig("wide_resnet50_2.tv_in1k", (2, 3, 4), weights="random"))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 83_802_624
    assert (net.recipe.resize, net.recipe.batch_size, net.recipe.max_epochs) == ("pil_bilinear", 16, 200)
    optimizer = net.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["betas"] == (0.5, 0.999)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (5e-3, 0)


def test_rd4ad_learns_and_leaves_the_teacher_as_it_is(project):
    configured(project, "rd4ad").run("--trainer.max_epochs=6", "--model.init_args.optimizer.lr=1e-3")
    config = yaml.safe_load((project.results / "runs" / "single" / "first" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "models.optimizers.ShortMomentumAdam"
    losses = project.losses()
    assert all(0 <= loss <= 3 for loss in losses)
    assert losses[-1] < losses[0]
    assert len(project.record().metrics)


def test_a_store_keeps_an_image_once_and_names_its_place(tmp_path):
    for memory in (10**6, 0):
        store = PatchStore(4, 2, 3, tmp_path / "patches.npy", memory)
        vectors = torch.arange(18.0).view(3, 2, 3)
        store.add(vectors[:2], [7, 3], ["a", "b"])
        store.add(vectors[1:], [3, 5], ["b", "a"])
        places = store.places(Group())
        assert [(place.id, place.row, place.category) for place in places] == [(3, 1, "b"), (5, 2, "a"), (7, 0, "a")]
        np.testing.assert_array_equal(store.vectors[:3], vectors)
        assert (tmp_path / "patches.npy").exists() == (memory == 0)
        store.close()
        assert not (tmp_path / "patches.npy").exists()


@pytest.mark.program
@pytest.mark.parametrize("method", ["patchcore", "padim", "rad"])
def test_two_processes_make_the_fit_of_one(programs, fitted, write_data, tmp_path, method):
    """Five images over two processes, so that one of them is dealt twice."""
    project = fitted(method)
    bolts = [{"name": "mvtec_ad", "root": str(write_data(tmp_path / "data", train=5)), "categories": ["bolt"]}]
    more = (f"--data.init_args.datasets={json.dumps(bolts)}",)
    project.run(*more, name="one")
    programs.run(project.arguments(*more, "--trainer.devices=2", "--trainer.strategy=ddp", name="two"))
    one, two = (project.record(name) for name in ("one", "two"))
    assert two.record.provenance["world_size"] == 2
    for key, value in fit_of(project, "two").items():
        torch.testing.assert_close(value, fit_of(project, "one")[key], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.metrics.value, two.metrics.value, rtol=0, atol=1e-5)
