"""RLR's module: the recipe, the ways to update level by level, and where its scores come from."""

import copy
from functools import partial

import lightning as L
import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F
from torch.optim import Adam

from lightning_modules.rlr import RLR
from lightning_modules.running.schedules import Drops
from models.backbones import BackboneConfig
from models.rlr import level_loss

BACKBONE = BackboneConfig("test_efficientnet.r160_in1k", (3, 4), weights="random")


def module(**options) -> RLR:
    torch.manual_seed(0)
    defaults = {"backbone": BACKBONE, "image_size": 128, "widths": (16, 32), "layers": 1, "heads": 2}
    return RLR(**(defaults | options))


def batches(count: int, images: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(images, 3, 128, 128, generator=generator),
            "label": torch.zeros(images, dtype=torch.int64),
            "category": ["a"] * images,
            "path": ["a.png"] * images,
        }
        for _ in range(count)
    ]


def trained(**options) -> RLR:
    """The module after two epochs of three batches without jitter, whose draws would depend on the order of work."""
    net = module(corruption="none", optimizer=partial(Adam, lr=1e-2, fused=True), **options)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, torch.utils.data.DataLoader(batches(3), batch_size=None))
    return net


def test_the_defaults_are_the_released_readme_command_at_the_published_size(uncalibrated):
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        net = RLR(BackboneConfig("tf_efficientnet_b6.aa_in1k", (3, 4), weights="random"))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 21_514_512
    assert (net.recipe.resize, net.recipe.batch_size, net.recipe.max_epochs) == ("pil_lanczos", 4, 200)
    assert net.recipe.gradient_clip_val is None
    assert (net.network.corruption, net.network.jitter_scale, net.network.probability) == ("jitter", 4.0, 1.0)
    assert [len(level.layers) for level in net.network.levels] == [4, 4]
    optimizer = net.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 1e-4
    assert optimizer.defaults["weight_decay"] == 0


def test_one_optimiser_for_all_levels_and_one_per_level_train_the_same_model():
    joint, separate = trained(update="joint"), trained(update="per_level")
    for (name, a), b in zip(joint.network.named_parameters(), separate.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_the_released_update_moves_every_level_once_more_by_its_momentum():
    expected = module(corruption="none")
    # The module's kernel: Adam makes a step of the rounding of a gradient that is zero (the bias of the keys).
    optimizer = torch.optim.Adam(expected.network.parameters(), lr=1e-2, fused=True)
    for batch in batches(3) * 2:
        for level in range(2):
            loss = level_loss(expected.reconstruct(batch)[level])
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
    released, joint = trained(update="released"), trained(update="joint")
    distance = 0.0
    for a, b, c in zip(*(m.network.parameters() for m in (released, expected, joint)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        distance = max(distance, (a - c).abs().max().item())
    assert distance > 1e-2


def test_a_single_level_can_be_updated_by_itself():
    backbone = BackboneConfig(BACKBONE.name, (4,), weights="random")
    trained(backbone=backbone, widths=(16,), update="per_level")


def test_pixel_metrics_read_the_unsmoothed_map_and_the_image_score_the_smoothed_one():
    net = module().eval()
    batch = batches(1)[0]
    with torch.no_grad():
        scored = net.evaluate(batch)[""]
        pairs = net.reconstruct(batch)
    maps = []
    for target, reconstruction in pairs:
        token = (target - reconstruction).square().mean(1) + 1 - F.cosine_similarity(target, reconstruction, dim=1)
        maps.append(F.interpolate(token[:, None], (128, 128), mode="bilinear", align_corners=True)[:, 0])
    expected = torch.stack(maps).mean(0).numpy()
    assert np.allclose(scored.maps.numpy(), expected, atol=1e-5)
    smoothed = [scipy.ndimage.gaussian_filter(one, sigma=4).max() for one in expected]
    assert np.allclose(scored.image_scores.numpy(), smoothed, atol=1e-4)


def test_the_diversity_term_enters_the_loss_with_its_weight():
    plain, weighted = (
        module(references=2, diversity_weight=weight, diversity_normaliser="pairs") for weight in (0.0, 3.0)
    )
    pairs = plain.reconstruct(batches(1)[0])
    terms = sum(level.diversity("pairs") for level in plain.network.levels)
    assert (weighted.loss(pairs) - plain.loss(pairs)).item() == pytest.approx(3 * terms.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "each"}, "joint, per_level or released"),
        ({"update": "released", "lr_scheduler": partial(Drops, first=3)}, "lr_scheduler"),
        ({"diversity_weight": -1.0}, "negative"),
    ],
)
def test_an_impossible_training_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_updates_between_backward_passes_are_refused_for_several_processes():
    net = module(update="released")
    net._trainer = type("Trainer", (), {"world_size": 2})()
    with pytest.raises(ValueError, match="update=joint"):
        net.on_fit_start()


def test_a_trained_module_is_the_same_after_saving_and_loading():
    net = module(fusion="theta", references=2)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(1)
    other.network.load_state_dict(net.network.state_dict())
    batch = batches(1)[0]
    assert torch.equal(net.eval().evaluate(batch)[""].maps, other.eval().evaluate(batch)[""].maps)
