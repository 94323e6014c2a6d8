"""The visual decoder turns any set of feature maps back into images of the right size."""

import pytest
import torch
from torch.nn import functional as F

from models.visual_decoder import VisualDecoder


@pytest.mark.parametrize(
    ("channels", "sizes", "image_size"),
    [
        ((72, 200), ((32, 32), (16, 16)), (256, 256)),  # RLR
        ((272,), ((14, 14),), (224, 224)),  # UniAD
        ((4, 6, 8, 10), ((56, 84), (28, 42), (14, 21), (7, 11)), (111, 168)),  # levels of an odd size, stride 2 first
        ((8, 8), ((16, 16), (16, 16)), (128, 128)),  # two pairs on one grid, as ULSAD's
        ((3,), ((40, 40),), (40, 40)),  # maps as large as the image
    ],
)
def test_every_methods_maps_become_images(channels, sizes, image_size):
    decoder = VisualDecoder(channels, sizes, image_size, width=16, depths=(1,))
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    pictures = decoder(maps)
    assert pictures.shape == (2, 3, *image_size)
    pictures.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_every_map_is_read():
    torch.manual_seed(0)
    decoder = VisualDecoder((3, 5), ((16, 16), (8, 8)), (64, 64), width=16, depths=(1,)).eval()
    maps = [torch.randn(1, 3, 16, 16), torch.randn(1, 5, 8, 8)]
    whole = decoder(maps)
    for index in range(2):
        changed = [m + (i == index) for i, m in enumerate(maps)]
        assert not torch.allclose(decoder(changed), whole)


def test_it_learns_to_invert_a_feature_map():
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(8, 3, 4, 4), (32, 32), mode="bilinear")
    maps = [F.avg_pool2d(images, 4) * 50]  # features come in any scale
    decoder = VisualDecoder((3,), ((8, 8),), (32, 32), width=32, depths=(1,))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.mse_loss(decoder(maps), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15 * images.var()


def test_maps_without_sizes_are_refused():
    with pytest.raises(ValueError, match="size of every map"):
        VisualDecoder((3, 4), ((8, 8),), (32, 32))
