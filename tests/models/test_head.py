import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from models.head import AnomalyHead, HeadConfig, distance_map, image_scores
from models.reconstruction import Pair


def pair(channels: int = 6, size: tuple[int, int] = (5, 7), seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(*(torch.randn(3, channels, *size, generator=generator) for _ in range(2)))


def naive_distance(p: Pair, kind: str, weight: float) -> np.ndarray:
    target, reconstruction = p.target.double().numpy(), p.reconstruction.double().numpy()
    out = np.empty((target.shape[0], *target.shape[2:]))
    for b, y, x in np.ndindex(*out.shape):
        t, r = target[b, :, y, x], reconstruction[b, :, y, x]
        squares = ((t - r) ** 2).sum()
        cosine = 1 - t @ r / (np.linalg.norm(t) * np.linalg.norm(r))
        out[b, y, x] = {
            "l2": np.sqrt(squares),
            "squared_sum": squares,
            "squared_mean": squares / len(t),
            "cosine": cosine,
            "mse_cosine": squares / len(t) + weight * cosine,
        }[kind]
    return out


@pytest.mark.parametrize("kind", ["l2", "squared_sum", "squared_mean", "cosine", "mse_cosine"])
def test_distances_are_the_papers_formulas(kind):
    found = distance_map(pair(), kind, cosine_weight=0.5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, naive_distance(pair(), kind, 0.5), rtol=1e-5, atol=1e-6)


def test_a_perfect_reconstruction_scores_zero_everywhere():
    target = pair().target
    for kind in ("l2", "squared_sum", "squared_mean", "cosine", "mse_cosine"):
        np.testing.assert_allclose(distance_map(Pair(target, target), kind), 0, atol=1e-6)


@pytest.mark.parametrize(("fusion", "combine"), [("sum", np.sum), ("mean", np.mean), ("product", np.prod)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_fusion_combines_levels_at_image_size(fusion, combine, align_corners):
    pairs = [pair(6, (10, 14), 1), pair(4, (5, 7), 2)]
    config = HeadConfig(distance="cosine", fusion=fusion, align_corners=align_corners, image_score="max")
    scored = AnomalyHead(config)(pairs, (20, 28))
    raised = [
        F.interpolate(distance_map(p, "cosine")[:, None], (20, 28), mode="bilinear", align_corners=align_corners)[:, 0]
        for p in pairs
    ]
    expected = combine(np.stack(raised), axis=0)
    np.testing.assert_allclose(scored.maps, expected, rtol=1e-5)
    np.testing.assert_allclose(scored.image_scores, expected.reshape(3, -1).max(1), rtol=1e-5)
    assert [tuple(level.shape) for level in scored.level_maps] == [(3, 10, 14), (3, 5, 7)]


def test_uniads_defaults_are_l2_times_16_and_pooled_maximum():
    p = pair(6, (4, 6))
    scored = AnomalyHead()([p], (64, 96))
    raised = F.interpolate(
        (p.target - p.reconstruction).norm(dim=1, keepdim=True), scale_factor=16, mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(scored.maps, raised[:, 0])
    for index, image in enumerate(raised[:, 0].double().numpy()):
        windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16))
        assert windows.shape[:2] == (49, 81)  # no padding, stride 1
        assert scored.image_scores[index].item() == pytest.approx(windows.mean((2, 3)).max(), rel=1e-5)


def test_image_scores_are_their_definitions():
    maps = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    flat = maps.reshape(2, -1).double().numpy()
    np.testing.assert_allclose(image_scores(maps, "max"), flat.max(1), rtol=1e-6)
    np.testing.assert_allclose(image_scores(maps, "mean"), flat.mean(1), rtol=1e-6)
    np.testing.assert_allclose(image_scores(maps, "std"), flat.std(1, ddof=0), rtol=1e-6)
    top = np.sort(flat, axis=1)[:, -30:].mean(1)  # 5 % of 600
    np.testing.assert_allclose(image_scores(maps, "top_k", top_k_fraction=0.05), top, rtol=1e-6)
    np.testing.assert_allclose(image_scores(maps, "top_k", top_k_fraction=1e-6), flat.max(1), rtol=1e-6)
    pooled = ndimage.uniform_filter(maps[0].double().numpy(), 5)[2:-2, 2:-2].max()
    assert image_scores(maps, "pooled_max", pool_window=5)[0].item() == pytest.approx(pooled, rel=1e-5)


def test_smoothing_can_spare_the_map_that_pixel_metrics_read():
    pairs = [pair(6, (12, 12))]
    options = {"distance": "mse_cosine", "smoothing_sigma": 4.0, "smoothing_border": "symmetric", "image_score": "max"}
    plain = AnomalyHead(HeadConfig(distance="mse_cosine", image_score="max"))(pairs, (48, 48))
    only_score = AnomalyHead(HeadConfig(**options, smoothing_target="image_score"))(pairs, (48, 48))
    both = AnomalyHead(HeadConfig(**options))(pairs, (48, 48))
    smooth = np.stack([ndimage.gaussian_filter(m, 4, truncate=4) for m in plain.maps.double().numpy()])
    torch.testing.assert_close(only_score.maps, plain.maps)
    np.testing.assert_allclose(both.maps, smooth, rtol=1e-5)
    for scored in (both, only_score):
        np.testing.assert_allclose(scored.image_scores, smooth.reshape(3, -1).max(1), rtol=1e-5)


def test_unias_chain_blurs_each_level_at_half_size_before_the_product():
    pairs = [pair(6, (16, 16), 1), pair(5, (4, 4), 2)]
    config = HeadConfig(
        distance="cosine",
        fusion="product",
        fusion_stride=2,
        align_corners=False,
        level_sigmas=(3.0, 1.0),
        level_kernels=(9, 3),
        image_score="max",
    )
    expected = np.ones((3, 16, 16))
    for p, sigma, radius in zip(pairs, (3.0, 1.0), (4, 1), strict=True):
        level = distance_map(p, "cosine")[:, None]
        level = F.interpolate(level, (16, 16), mode="bilinear", align_corners=False)[:, 0].double().numpy()
        expected *= np.stack([ndimage.gaussian_filter(m, sigma, mode="mirror", radius=radius) for m in level])
    expected = F.interpolate(torch.from_numpy(expected)[:, None], (32, 32), mode="bilinear", align_corners=True)[:, 0]
    head = AnomalyHead(config)
    scored = head(pairs, (32, 32))
    np.testing.assert_allclose(scored.maps, expected, rtol=1e-4)
    one = head.score(scored.level_maps, (32, 32), selection=[1])
    alone = AnomalyHead(
        HeadConfig(
            distance="cosine",
            fusion_stride=2,
            align_corners=False,
            level_sigmas=(1.0,),
            level_kernels=(3,),
            image_score="max",
        )
    )
    torch.testing.assert_close(one.maps, alone([pairs[1]], (32, 32)).maps)


def test_level_affine_acts_per_level():
    pairs = [pair(6, (8, 8), 1), pair(6, (8, 8), 2)]
    head = AnomalyHead(HeadConfig(distance="squared_mean", fusion="mean", image_score="max"))
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 3.0])
    maps = [distance_map(p, "squared_mean") for p in pairs]
    expected = (2 * maps[0] - 1 + 0.5 * maps[1] + 3) / 2
    torch.testing.assert_close(head(pairs, (8, 8), level_affine=(scale, shift)).maps, expected)


def test_everything_is_float32_under_autocast():
    p = Pair(*(t.bfloat16() for t in pair()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = AnomalyHead(HeadConfig(distance="mse_cosine", smoothing_sigma=1.0))([p], (32, 32))
    assert scored.maps.dtype == scored.image_scores.dtype == scored.level_maps[0].dtype == torch.float32
    outside = AnomalyHead(HeadConfig(distance="mse_cosine", smoothing_sigma=1.0))([p], (32, 32))
    assert torch.equal(scored.maps, outside.maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "L2"}, 'head.distance is "L2"'),
        ({"fusion": "max"}, "sum, mean, product"),
        ({"image_score": "median"}, "pooled_max"),
        ({"smoothing_target": "map"}, "both, image_score"),
        ({"smoothing_border": "zero"}, "reflect, symmetric"),
        ({"cosine_weight": -1.0}, "cosine_weight"),
        ({"fusion_stride": 0}, "fusion_stride"),
        ({"smoothing_kernel": 5}, "nothing would be smoothed"),
        ({"smoothing_sigma": -1.0}, "smoothing_sigma"),
        ({"level_sigmas": (1.0,), "level_kernels": (3, 5)}, "one of each per level"),
        ({"pool_window": 0}, "pool_window"),
        ({"top_k_fraction": 0.0}, "top_k_fraction"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**options)


def test_impossible_maps_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="pool_window is 16 but the anomaly map is only 10x12"):
        AnomalyHead()([pair()], (10, 12))
    with pytest.raises(ValueError, match="level_sigmas has 2 values but the network gives 1"):
        AnomalyHead(HeadConfig(level_sigmas=(1.0, 2.0)))([pair()], (32, 32))
    head = AnomalyHead()
    with pytest.raises(ValueError, match="non-empty choice"):
        head.score(head.level_maps([pair()]), (32, 32), selection=[1])
    with pytest.raises(ValueError, match="differ in shape"):
        distance_map(Pair(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)), "l2")
