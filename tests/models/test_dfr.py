import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from models.backbones import BackboneConfig, FeatureExtractor
from models.dfr import DFRNetwork, RegionalFeatures, StreamingCovariance, latent_dimension, region_matrix

VGG = BackboneConfig("vgg19.tv_in1k", (1, 2, 3, 4), weights="random", padding="reflect", maps="relu")


@pytest.fixture(scope="module")
def vgg() -> FeatureExtractor:
    with pytest.warns(UserWarning, match="RANDOM"):
        return FeatureExtractor(VGG)


def regional(extractor: FeatureExtractor, image_size: tuple[int, int]) -> RegionalFeatures:
    return RegionalFeatures(extractor.channels, extractor.strides, image_size)


@pytest.mark.program
def test_vgg19_gives_3456_channels_on_a_64_by_64_grid_and_the_released_map_sizes(vgg):
    assert vgg.channels == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 4
    maps = vgg(torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    assert [m.shape[1] for m in maps] == vgg.channels
    assert [m.shape[-2:] for m in maps] == vgg.sizes(256)
    features = regional(vgg, (256, 256))
    sides = [m.shape[-1] + 2 * padded for m, padded in zip(maps, features.padded, strict=True)]
    assert sides == [258, 256, 130, 128, 66, 66, 66, 64, 34, 34, 34, 32]
    assert features(maps).shape == (1, 3456, 64, 64)
    assert features.channels == 3456


def test_regional_features_equal_convolving_padding_resizing_and_pooling_one_by_one(vgg):
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    convolutions = [m for m in vgg.modules() if isinstance(m, torch.nn.Conv2d)]
    x, expected = images, []
    with torch.no_grad():
        for block in ((0, 1), (2, 3), (4, 5, 6, 7), (8, 9, 10, 11)):
            for i in block:
                x = F.pad(x, (1, 1, 1, 1), mode="reflect")
                if i != block[0]:
                    expected.append(x)  # the previous ReLU, as padded for this convolution
                x = F.relu(F.conv2d(x, convolutions[i].weight, convolutions[i].bias))
            expected.append(x)
            x = F.max_pool2d(x, 2)
        expected = [F.interpolate(m, (32, 48), mode="bilinear", align_corners=True) for m in expected]
        expected = torch.cat([F.avg_pool2d(m, 4) for m in expected], 1)
        features = regional(vgg, (32, 48))(vgg(images))
    assert features.shape == (1, 3456, 8, 12)
    error = (features - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize(("side", "source"), [(256, 258), (256, 32), (64, 64), (32, 9)])
def test_region_matrix_is_resize_then_mean(side, source):
    signal = torch.randn(1, 1, source, dtype=torch.float64, generator=torch.Generator().manual_seed(source))
    expected = F.avg_pool1d(F.interpolate(signal, side, mode="linear", align_corners=True), 4)[0, 0]
    torch.testing.assert_close(region_matrix(side, source).double() @ signal[0, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(region_matrix(side, source).sum(1), torch.ones(side // 4))


def test_other_backbones_give_one_map_per_level():
    with pytest.warns(UserWarning, match="RANDOM"):
        resnet = FeatureExtractor(BackboneConfig("resnet18.a1_in1k", (1, 2, 3), weights="random"))
    features = regional(resnet, (64, 64))
    assert features.padded == [False] * 3
    assert features(resnet(torch.randn(2, 3, 64, 64))).shape == (2, 256, 16, 16)


def test_relu_maps_of_another_backbone_and_odd_image_sizes_are_refused(vgg):
    with pytest.warns(UserWarning, match="RANDOM"), pytest.raises(ValueError, match="needs a VGG"):
        FeatureExtractor(BackboneConfig("resnet18.a1_in1k", (1, 2), weights="random", maps="relu"))
    with pytest.raises(ValueError, match="maps"):
        BackboneConfig("vgg19.tv_in1k", (1, 2), maps="all")
    with pytest.raises(ValueError, match="divisible by 4"):
        regional(vgg, (30, 32))


@pytest.mark.parametrize(("latent", "millions"), [(100, 13.42), (200, 15.05), (300, 16.83)])
def test_autoencoder_has_the_released_number_of_parameters(latent, millions):
    with torch.device("meta"):
        net = DFRNetwork(RegionalFeatures([3456], [1], (256, 256)), latent)
        (pair,) = net([torch.empty(2, 3456, 64, 64)])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    assert pair.reconstruction.shape == (2, 3456, 64, 64)


def test_autoencoder_layers_are_the_released_ones():
    net = DFRNetwork(RegionalFeatures([20], [1], (8, 8)), 3)
    kinds = [type(m).__name__ for m in [*net.encoder, *net.decoder]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"] + ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + [
        "Conv2d"
    ]
    widths = [(m.in_channels, m.out_channels) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [(20, 13), (13, 6), (6, 3), (3, 6), (6, 13), (13, 20)]
    with pytest.raises(ValueError, match="latent"):
        net.build(0)


def test_latent_size_is_that_of_a_full_pca():
    generator = np.random.RandomState(0)
    x = (generator.randn(400, 30) * np.linspace(5, 0.1, 30)) @ generator.randn(30, 30) + 100
    covariance = StreamingCovariance(30)
    for part in torch.from_numpy(x).split([100, 7, 293]):
        covariance.update(part)
    torch.testing.assert_close(covariance.covariance(), torch.from_numpy(np.cov(x.T)), rtol=1e-9, atol=1e-9)
    ratio = PCA().fit(x).explained_variance_ratio_
    eigenvalues = covariance.eigenvalues()
    np.testing.assert_allclose(eigenvalues / eigenvalues.sum(), ratio, rtol=1e-8)
    for explained in (0.5, 0.9, 0.99):
        assert latent_dimension(eigenvalues, explained) == int(np.argmax(np.cumsum(ratio) > explained)) + 1


def test_latent_size_by_hand():
    assert latent_dimension(torch.tensor([1.0, 8.0, 1.0]), 0.79) == 1
    assert latent_dimension(torch.tensor([0.5, 0.25, 0.25]), 0.75) == 3  # 0.75 does not exceed 0.75
    with pytest.raises(ValueError, match="do not vary"):
        latent_dimension(torch.zeros(3))


def test_the_latent_size_of_standardised_features_comes_from_their_correlations():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 5)) * [1, 10, 100, 0.1, 0]
    covariance = StreamingCovariance(5)
    for part in np.array_split(x, 7):
        covariance.update(torch.from_numpy(part))
    oracle = np.linalg.eigvalsh(np.corrcoef(x[:, :4], rowvar=False))[::-1]  # the last channel never varies
    np.testing.assert_allclose(covariance.eigenvalues(standardised=True), [*oracle, 0], atol=1e-9)
