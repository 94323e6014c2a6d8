import numpy as np
import pytest

from lightning_modules.metrics.spro import Region, au_spro, saturation_area, spro_curve


def region(shape, pixels, saturation) -> Region:
    mask = np.zeros(shape, dtype=bool)
    for y, x in pixels:
        mask[y, x] = True
    return Region(mask, saturation)


def slow_curve(samples, limit) -> float:
    """The definition, threshold by threshold."""
    thresholds = np.unique(np.concatenate([np.asarray(m, np.float32).ravel() for m, _ in samples]))[::-1]
    fpr, spro = [0.0], [0.0]
    for t in thresholds:
        overlaps, false, normal = [], 0, 0
        for m, regions in samples:
            detected = np.asarray(m, np.float32) >= t
            good = np.ones(detected.shape, bool)
            for r in regions:
                overlaps.append(min((detected & r.pixels).sum() / r.saturation_area, 1.0))
                good &= ~r.pixels
            false, normal = false + (detected & good).sum(), normal + good.sum()
        fpr.append(false / normal)
        spro.append(np.mean(overlaps))
    grid_x, grid_y = np.array(fpr), np.array(spro)
    keep = grid_x <= limit
    x, y = grid_x[keep], grid_y[keep]
    if not keep.all():
        k = keep.sum()
        end = y[-1] + (grid_y[k] - y[-1]) * (limit - x[-1]) / (grid_x[k] - x[-1])
        x, y = np.append(x, limit), np.append(y, end)
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum() / limit)


def test_by_hand_half_saturation():
    """A region of 4 pixels saturates at 2; one normal pixel of 4 scores between its 1st and its 2nd pixel."""
    scores = np.array([[9, 7, 2, 1], [8, 3, 3, 0]], np.float32)
    r = region((2, 4), [(0, 0), (0, 1), (0, 2), (0, 3)], 2)
    # Descending: 9 (region, sPRO .5), 8 (normal, FPR .25), 7 (region, sPRO 1: saturated), the rest normal.
    # Area: 0.5 over [0, .25], 1 over [.25, 1].
    samples = [(scores, [r])]
    assert au_spro(lambda: samples, 1.0) == pytest.approx(0.5 * 0.25 + 0.75)
    assert au_spro(lambda: samples, 0.25) == pytest.approx(0.5)
    assert au_spro(lambda: samples, 0.5) == pytest.approx((0.5 * 0.25 + 0.25) / 0.5)


def test_by_hand_ties_are_a_straight_line():
    """A region pixel and 2 of 4 normal pixels share the top score: sPRO rises linearly to 1 over FPR 0 to 0.5."""
    scores = np.array([[5, 5, 5, 1, 0]], np.float32)
    samples = [(scores, [region((1, 5), [(0, 0)], 1)])]
    assert au_spro(lambda: samples, 0.5) == pytest.approx(0.5)
    assert au_spro(lambda: samples, 0.25) == pytest.approx(0.25)  # up to half the line: mean of 0 and .5
    assert au_spro(lambda: samples, 1.0) == pytest.approx(0.75)


def test_by_hand_two_regions_overlap_and_a_good_image_counts_for_the_fpr():
    scores = np.array([[4, 3, 2, 1]], np.float32)
    regions = [region((1, 4), [(0, 0), (0, 1)], 1), region((1, 4), [(0, 1), (0, 2)], 2)]
    good = np.array([[3.5, 0, 0]], np.float32)
    # Normal pixels: 1 of the first image (score 1) and 3 of the good one. Descending:
    # 4: first region saturated: mean .5 | 3.5: FPR .25 | 3: second half: mean .75 | 2: mean 1 | 1, 0 normal.
    samples = [(scores, regions), (good, [])]
    assert au_spro(lambda: samples, 1.0) == pytest.approx(0.25 * 0.5 + 0.75)
    assert spro_curve(lambda: samples).regions == 2


def test_a_perfect_map_scores_1_and_an_inverted_one_0():
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    samples = [(mask.astype(np.float32), [Region(mask, 9)]), (np.zeros((8, 8), np.float32), [])]
    assert au_spro(lambda: samples, 0.05) == 1.0
    inverted = [(1 - m, r) for m, r in samples]
    assert au_spro(lambda: inverted, 0.3) == 0.0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_random_cases_agree_with_the_definition(seed, limit):
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(5):
        scores = generator.normal(size=(9, 7)).astype(np.float32) * 10.0 ** generator.integers(-3, 3)
        if seed % 3 == 0:
            scores = np.round(scores)  # ties, and -0
        regions = []
        for _ in range(generator.integers(0, 3)):
            pixels = generator.random((9, 7)) < 0.15
            pixels[0, 0] = True
            regions.append(Region(pixels, int(generator.integers(1, pixels.sum() + 1))))
        samples.append((scores, regions))
    samples[0] = (samples[0][0], [region((9, 7), [(3, 3), (4, 3)], 1)])
    assert au_spro(lambda: samples, limit) == pytest.approx(slow_curve(samples, limit), abs=1e-12)


def test_without_saturation_and_one_region_per_component_it_is_aupro():
    generator = np.random.default_rng(0)
    mask = np.zeros((16, 16), bool)
    mask[3:6, 3:9] = True
    scores = generator.normal(size=(16, 16)).astype(np.float32) + mask
    regions = [Region(mask, int(mask.sum()))]
    assert au_spro(lambda: [(scores, regions)], 0.3) == pytest.approx(slow_curve([(scores, regions)], 0.3), abs=1e-12)


def test_saturation_areas_are_the_official_ones():
    assert saturation_area(39, 0.25, relative=True) == 9  # int(9.75)
    assert saturation_area(39, 100, relative=False) == 39
    assert saturation_area(39, 20, relative=False) == 20
    assert saturation_area(3, 0.1, relative=True) == 1  # the official code would divide by int(0.3) = 0


def test_mistakes_are_named():
    good = (np.zeros((2, 2), np.float32), [])
    everything = region((2, 2), [(0, 0), (0, 1), (1, 0), (1, 1)], 1)
    for samples, message in (
        ([good], "no region"),
        ([(good[0], [everything])], "no normal pixel"),
        ([(np.full((2, 2), np.nan), [everything])], "NaN"),
        ([(np.zeros((2, 3)), [everything])], "a region is"),
        ([(good[0], [region((2, 2), [(0, 0)], 2)])], "saturation area"),
    ):
        with pytest.raises(ValueError, match=message):
            au_spro(lambda samples=samples: samples)
    with pytest.raises(ValueError, match="limit"):
        spro_curve(lambda: [good, (good[0], [region((2, 2), [(0, 0)], 1)])], 0.05).area(0.3)
