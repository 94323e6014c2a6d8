"""UniAS's module: the released recipe, level subsets from one training, and sweeps whose every cell can be built."""

from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from scipy import ndimage
from torch.nn import functional as F

from lightning_modules.unias import UniAS
from models.backbones import BackboneConfig, FeatureExtractor
from models.reconstruction import Pair
from models.unias import UniAS as Network
from sweeps.runner.checked_sweep import load

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
BACKBONE = BackboneConfig("tf_efficientnet_b0.aa_in1k", (1, 2, 3, 4), weights="random")
SMALL = {"width": 32, "feedforward": 32, "encoder_layers": 1, "neighbor_size": 3}
TABLE_4 = ("4", "3", "2", "1", "4+3", "4+1", "4+3+2", "4+3+2+1")


@cache
def extractor(config: BackboneConfig) -> FeatureExtractor:
    return FeatureExtractor(config)


@pytest.fixture(autouse=True)
def one_backbone(monkeypatch):
    """The same frozen random backbone for all tests, because building it takes a second."""
    monkeypatch.setattr("lightning_modules.base.FeatureExtractor", extractor)


def module(**options) -> UniAS:
    torch.manual_seed(0)
    return UniAS(**({"backbone": BACKBONE, "image_size": 64} | SMALL | options)).eval()


def batch() -> dict:
    return {"image": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), "label": torch.zeros(2)}


@torch.no_grad()
def test_map_is_the_product_of_blurred_cosine_distances_at_half_size():
    method = module()
    scored = method.evaluate(batch())[""]
    fused = torch.ones(2, 32, 32, dtype=torch.float64)
    settings = {1: (9, 3.0), 2: (7, 7 / 3), 3: (5, 5 / 3), 4: (3, 1.0)}
    for level, pair in enumerate(method.reconstruct(batch()), start=1):
        kernel, sigma = settings[level]
        dot = (pair.target * pair.reconstruction).sum(1)
        distance = 1 - dot / pair.target.norm(dim=1) / pair.reconstruction.norm(dim=1)
        distance = F.interpolate(distance[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
        radius = kernel // 2
        blurred = ndimage.gaussian_filter(
            distance.double().numpy(), (0, sigma, sigma), mode="mirror", radius=(0, radius, radius)
        )
        fused *= torch.from_numpy(blurred)
    fused = F.interpolate(fused[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0].float()
    assert torch.allclose(scored.maps, fused, rtol=1e-3, atol=1e-6)
    assert torch.equal(scored.image_scores, scored.maps.flatten(1).max(1).values)


@torch.no_grad()
def test_all_rows_of_table_4_come_from_one_forward_pass(monkeypatch):
    method = module(select=TABLE_4)
    passes = []
    forward = method.network.forward
    monkeypatch.setattr(method.network, "forward", lambda features: passes.append(1) or forward(features))
    scored = method.evaluate(batch())
    assert list(scored) == ["", *(f"levels={subset}" for subset in TABLE_4)]
    assert len(passes) == 1
    assert torch.equal(scored[""].maps, scored["levels=4+3+2+1"].maps)
    level_maps = scored[""].level_maps
    size = (32, 32)
    four, three = (
        method.head.level_blurs[i](F.interpolate(level_map[:, None], size, mode="bilinear", align_corners=False))
        for i, level_map in ((3, level_maps[0]), (2, level_maps[1]))
    )
    for name, expected in (("levels=4", four), ("levels=4+3", four * three)):
        expected = F.interpolate(expected, (64, 64), mode="bilinear", align_corners=True)[:, 0]
        assert torch.allclose(scored[name].maps, expected, atol=1e-6)


def test_a_subset_trained_by_itself_keeps_the_blur_of_its_levels():
    method = module(levels=[4, 2], select=TABLE_4)
    assert [blur.taps.numel() for blur in method.head.level_blurs] == [7, 3]
    assert list(method.subsets) == ["levels=4", "levels=2"]
    assert method.map_names == ("level 4", "level 2")
    assert [level.shape[1] for level in method.evaluate(batch())[""].level_maps] == [4, 16]
    assert set(method.evaluate(batch())) == {"", "levels=4", "levels=2"}


def test_learning_rate_falls_one_epoch_after_the_drops_as_in_the_released_code():
    method = module()
    configured = method.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [rates.count(rate) for rate in sorted(set(rates), reverse=True)] == [401, 400, 199]
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 1e-4
    assert rates[0] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-6)


def test_recipe_is_the_released_one():
    recipe = UniAS.recipe
    assert (recipe.batch_size, recipe.max_epochs, recipe.gradient_clip_val) == (64, 1000, 0.1)
    assert recipe.best_on_test == ("pixel_auroc", 10)


def test_released_sign_of_the_loss_is_an_option():
    target = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    perfect = [Pair(target, target)]
    assert module().loss(perfect).item() == pytest.approx(0, abs=1e-5)
    assert module(cosine_term="as_released").loss(perfect).item() == pytest.approx(10)
    assert module(cosine_term="as_released", loss_weight=1.0).loss(perfect).item() == pytest.approx(1)


@pytest.mark.parametrize("subset", ["5", "4,3", "4+4", ""])
def test_a_subset_that_cannot_be_selected_says_how_to_write_it(subset):
    with pytest.raises(ValueError, match=r"different levels from 1 to 4 with a plus between them, for example 4\+3"):
        module(select=[subset])


def cells_of(ablation: str) -> list[dict]:
    prefix = "model.init_args"
    cells = []
    for cell in load(str(ROOT / "sweeps" / f"{ablation}.yaml")).cells():
        options = dict(cell.parameters.get(prefix, {}))
        options |= {
            name.removeprefix(f"{prefix}."): value
            for name, value in cell.parameters.items()
            if "model" in name and name != prefix
        }
        cells.append(options)
    return cells


@pytest.mark.parametrize(
    ("ablation", "rows"), [("feature_levels", 8), ("structural_components", 9), ("sar", 4), ("feature_filter", 4)]
)
def test_every_cell_of_the_papers_ablations_can_be_built_and_differs(ablation, rows):
    profile = yaml.safe_load((ROOT / "sweeps" / "profiles" / "demo" / "unias.yaml").read_text())["model"]["init_args"]
    own = {"backbone", "optimizer", "lr_scheduler", "lr_interval", "image_size", "select"}
    networks = []
    for cell in cells_of(ablation):
        assert set(cell.get("select", ())) <= set(TABLE_4)
        options = {name: value for name, value in (profile | cell).items() if name not in own}
        networks.append(Network([16, 24, 40, 112], [(64, 64), (32, 32), (16, 16), (8, 8)], **options))
    assert len(networks) == rows
    assert len({str(network) for network in networks}) == rows
