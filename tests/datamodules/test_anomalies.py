"""Synthetic anomalies: what they look like, and that nothing but (seed, epoch, image) decides them."""

from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from datamodules import DatasetConfig, UnifiedDataModule
from datamodules.anomalies.perlin import draw_blobs, perlin_noise
from datamodules.anomalies.sources import Anomalies, AnomalyConfig
from datamodules.anomalies.textures import FAMILIES, draw_texture
from datamodules.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:folder. 2 remarks")  # the trees here have no test image
Row = namedtuple("Row", "category image")
PLAIN = np.full((64, 64, 3), 90, np.uint8)


def load(row):
    return row.image, np.zeros(row.image.shape[:2], bool)


@pytest.fixture(scope="module")
def rows():
    """Two categories, one red and one blue."""
    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 220, 220
    return [Row("red", red), Row("red", red), Row("blue", blue)]


@pytest.mark.program
def test_blobs_have_the_published_size_and_are_seldom_empty():
    areas = np.array([draw_blobs(np.random.default_rng(seed), (256, 256)).mean() for seed in range(500)])
    assert areas.mean() == pytest.approx(0.052, abs=0.007)
    assert 0.02 <= (areas == 0).mean() <= 0.08


def test_noise_of_one_cell_is_smooth_over_the_image():
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (2, 2))
    noise = perlin_noise(angles, (64, 48))
    assert noise.shape == (64, 48)
    assert np.abs(np.diff(noise, axis=0)).max() < 0.1
    assert np.abs(noise).max() <= np.sqrt(2)


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_no_texture_family_gives_a_constant_picture(family):
    for seed in range(20):
        field = FAMILIES[family](np.random.default_rng(seed), (64, 96))
        assert field.shape == (64, 96)
        assert np.isfinite(field).all()
        assert field.std() > 0


def test_textures_stand_out_from_most_images():
    differences = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        texture = draw_texture(rng, (64, 64))
        assert texture.dtype == np.uint8
        assert texture.std() > 1
        differences.append(np.abs(texture.astype(float) - PLAIN).mean() / 255)
    assert np.mean(np.array(differences) >= 0.1) >= 0.8


def test_the_seed_alone_decides_an_anomaly_and_pixels_outside_it_stay(rows):
    for source in ("textures", "own"):
        make = Anomalies(AnomalyConfig(source), rows, load)
        for seed in range(20):
            image, mask = make(PLAIN, "red", seed)
            again, same = Anomalies(AnomalyConfig(source), rows, load)(PLAIN, "red", seed)
            np.testing.assert_array_equal(image, again)
            np.testing.assert_array_equal(mask, same)
            assert mask.dtype == bool
            assert (image[~mask] == 90).all()
            assert ((image >= 0) & (image <= 255)).all()
    assert (PLAIN == 90).all()


def test_own_crops_come_from_another_category(rows):
    make = Anomalies(AnomalyConfig("own"), rows, load)
    black = np.zeros((64, 64, 3), np.uint8)
    for seed in range(30):
        image, mask = make(black, "red", seed)
        if mask.any():
            assert image[mask][:, 2].mean() > image[mask][:, 0].mean()  # blue, whatever the change of saturation


def test_a_folder_of_photographs_is_used_and_its_contents_are_recorded(tmp_path, rows):
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{number}.png")
    config = AnomalyConfig("dtd", str(tmp_path))
    make = Anomalies(config, rows, load)
    black = np.zeros((64, 64, 3), np.uint8)
    seen = set()
    for seed in range(30):
        image, mask = make(black, "red", seed)
        if mask.any():
            inside = image[mask]
            assert (inside == inside[0]).all()
            assert 0.2 * 255 - 1e-3 <= inside[0].max() <= 255
            seen.add(tuple(inside[0] > 0))
    assert seen == {(True, False, False), (False, True, False)}
    before = make.describe()
    assert "dtd" in before
    assert "2 photographs" in before
    Image.new("RGB", (30, 20), (0, 0, 255)).save(tmp_path / "1.png")
    assert Anomalies(config, rows, load).describe() != before
    with pytest.raises(DataError, match="holds no image"):
        Anomalies(AnomalyConfig("dtd", str(tmp_path / "nothing")), rows, load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "dtd"}, "needs the folder"),
        ({"source": "texture"}, "textures"),
        ({"source": "own", "folder": "x"}, "no other source"),
        ({"opacity": "0.5"}, "released, paper"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AnomalyConfig(**options)


@pytest.fixture(scope="module")
def tree(make, tmp_path_factory):
    return make.folders(tmp_path_factory.mktemp("tree"), 40)


def module(tree, **options) -> UnifiedDataModule:
    data = UnifiedDataModule(
        [DatasetConfig("folder", str(tree))],
        image_size=32,
        resize="pil_bilinear",
        batch_size=2,
        **{"anomalies": AnomalyConfig("own"), "num_workers": 0, **options},
    )
    data.setup("fit")
    return data


def drawn(loader, epoch: int) -> dict[int, list[np.ndarray]]:
    loader.sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        for k, number in enumerate(batch["id"].tolist()):
            found[number] = [batch[name][k].numpy() for name in ("image", "clean", "mask")]
    return found


def test_workers_and_processes_change_nothing_and_epochs_do(tree):
    data = module(tree)
    one, next_epoch = drawn(data.train_dataloader(), 0), drawn(data.train_dataloader(), 1)
    workers = drawn(module(tree, num_workers=2).train_dataloader(), 0)
    parts = {}
    for rank in range(2):
        part = module(tree)
        part._place = lambda rank=rank: (2, rank)
        parts |= drawn(part.train_dataloader(), 0)
    assert len(one) == 10
    for number, expected in one.items():
        for other in (workers, parts):
            for array, same in zip(expected, other[number], strict=True):
                np.testing.assert_array_equal(array, same)
    assert any(not np.array_equal(one[n][2], next_epoch[n][2]) for n in one)


def test_a_training_batch_carries_the_clean_image_and_the_anomalys_mask(tree):
    data = module(tree)
    batch = next(iter(data.train_dataloader()))
    outside = ~batch["mask"].expand_as(batch["image"])
    assert (batch["image"] - batch["clean"]).abs()[outside].max() < 1e-5
    assert batch["mask"].any()
    assert (batch["image"] - batch["clean"]).abs()[~outside].max() > 0.1
    assert batch["label"].tolist() == [0, 0]
    assert "clean" not in next(iter(data.train_images()))
    assert data.symmetric_rows() is None  # features of such images cannot be cached
