"""Dinomaly, INP-Former and the noisy bottleneck from photographs to a record, on a tiny random backbone."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.dinomaly import Dinomaly, Dinomaly2
from lightning_modules.inp_former import INPFormer
from models.backbones import BackboneConfig
from models.head import HeadConfig

VIT = {"name": "test_vit", "levels": [1, 2, 3, 4], "weights": "random"}
METHODS = {
    "dinomaly.Dinomaly": ({**VIT, "prefix_tokens": True}, {"mining_steps": 2}),
    "dinomaly.Dinomaly2": ({**VIT, "prefix_tokens": True}, {"narrow": 8}),
    "inp_former.INPFormer": (VIT, {"prototypes": 2, "score_distance": True}),
    "noisy_bottleneck.NoisyBottleneck": (
        {"name": "test_efficientnet.r160_in1k", "levels": [2, 3], "weights": "random"},
        {"width": 8, "heads": 2},
    ),
}


def configure(project, method: str) -> None:
    backbone, options = METHODS[method]
    project.use(method, data={"batch_size": 4}, backbone=backbone, image_size=64, **options)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_from_photographs_to_a_record_with_its_schedule_per_step(project, method):
    configure(project, method)
    record = project.fit("--trainer.max_epochs=2")
    metrics = record.metrics
    mean = metrics[(metrics.scope == "mean") & (metrics.metric == "pixel_ap") & (metrics.dataset == "")]
    assert mean.value.notna().all()
    assert ("map=distance" in set(metrics.variant)) == (method == "inp_former.INPFormer")
    state = torch.load(project.checkpoint(), weights_only=False)
    (schedule,) = state["lr_schedulers"]
    assert schedule["total_steps"] == schedule["last_epoch"] == state["global_step"]


def test_features_from_the_cache_train_to_the_same_losses_as_those_computed_in_every_step(project):
    configure(project, "dinomaly.Dinomaly")
    project.fit("--trainer.max_epochs=2", "--cache.mode=float32", name="cached")
    project.fit("--trainer.max_epochs=2", "--cache.mode=off", name="computed")
    assert project.losses("cached") == pytest.approx(project.losses("computed"), rel=1e-5)


BACKBONE = BackboneConfig("test_vit", (1, 2, 3, 4), weights="random", prefix_tokens=True)


def test_maps_have_the_size_of_the_head_and_their_names_say_which_blocks():
    method = Dinomaly(backbone=BACKBONE, image_size=64).eval()
    scored = method(torch.randn(2, 3, 64, 64))
    assert scored.maps.shape == (2, 256, 256)
    assert method.map_names == ("blocks 1, 2", "blocks 3, 4")


def test_a_tenth_of_the_rate_moves_dinomaly2s_first_layer():
    method = Dinomaly2(backbone=BACKBONE, image_size=64)
    optimizer = method.optimizer_of(method.network.parameters())
    rates = [(group["lr"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
    narrow = sum(p.numel() for p in method.network.bottleneck.narrow.parameters())
    assert rates[1] == (pytest.approx(2e-4), narrow)
    assert rates[0] == (2e-3, sum(p.numel() for p in method.network.parameters()) - narrow)


def test_the_noise_is_mined_from_the_first_step_as_the_schedule_says():
    method = Dinomaly(backbone=BACKBONE, image_size=64, mining_steps=1000, head=HeadConfig())
    pairs = method.reconstruct({"image": torch.randn(2, 3, 64, 64)})
    plain = torch.autograd.grad(method.loss(pairs), pairs[0].reconstruction, retain_graph=True)[0]
    method.mining_steps = 0
    mined = torch.autograd.grad(method.loss(pairs), pairs[0].reconstruction)[0]
    ratio = (mined.norm(dim=1) / plain.norm(dim=1)).flatten()
    assert (ratio - 0.1).abs().lt(1e-3).sum() == 29  # 32 positions, int(3.2) of them untouched
    assert (ratio - 1.0).abs().lt(1e-3).sum() == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Dinomaly, {"mining_share": 2.0}, "mining_share=2.0"),
        (INPFormer, {}, "prefix_tokens=false"),
        (INPFormer, {"mining_gamma": -1.0}, "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(backbone=BACKBONE, image_size=64, **options)
