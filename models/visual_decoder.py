"""Feature maps back to pictures: a decoder that inverts frozen features, so that reconstructions can be looked at.

It takes no part in detection. It is trained on normal images only, by mean squared error against the normalised image
(RLR's optional visual decoder, arXiv:2403.11561, and the pictures of UniAD's slides); what it draws for reconstructed
features is what those features would look like, as far as it can tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.neck import resize

DEPTHS = (3, 4, 6, 3)


class VisualDecoder(nn.Module):
    """Stages of residual basic blocks, each followed by bilinear up-sampling by 2, from the coarsest map to the image.

    Each map is projected by a 1x1 convolution with batch norm and added at the first stage that is as large as it.

    Args:
        channels: C of each map.
        sizes: (H, W) of each map, in any order.
        image_size: (height, width) of the images in pixels.
        width: channels of the first stage, halved from stage to stage (at least 16).
        depths: basic blocks per stage; the last entry holds for all later stages.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
        width: int = 256,
        depths: Sequence[int] = DEPTHS,
    ) -> None:
        super().__init__()
        if len(channels) != len(sizes) or not sizes:
            raise ValueError(f"Give channels and size of every map, found {list(channels)} and {list(sizes)}.")
        rows, columns = image_size
        self.image_size = (rows, columns)
        rows, columns = min(sizes)
        stage_sizes = [(rows, columns)]
        while 2 * stage_sizes[-1][0] < self.image_size[0] or 2 * stage_sizes[-1][1] < self.image_size[1]:
            stage_sizes.append((2 * stage_sizes[-1][0], 2 * stage_sizes[-1][1]))
        self.stage_sizes = stage_sizes
        # The stage at which each map enters; a map finer than every stage enters the last one.
        self.entries = [
            next((i for i, stage in enumerate(stage_sizes) if stage[0] >= size[0]), len(stage_sizes) - 1)
            for size in sizes
        ]
        widths = [max(16, width >> stage) for stage in range(len(stage_sizes))]
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, widths[entry], 1, bias=False), nn.BatchNorm2d(widths[entry]))
            for c, entry in zip(channels, self.entries, strict=True)
        )
        self.stages = nn.ModuleList()
        for stage, stage_width in enumerate(widths):
            blocks = [BasicBlock(stage_width) for _ in range(depths[min(stage, len(depths) - 1)])]
            following = widths[stage + 1] if stage + 1 < len(widths) else stage_width
            self.stages.append(nn.Sequential(*blocks, nn.Conv2d(stage_width, following, 1)))
        self.image = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps (B, C_l, H_l, W_l) as constructed -> images (B, 3, height, width), normalised as the training images."""
        picture: Tensor | None = None
        for stage, (size, blocks) in enumerate(zip(self.stage_sizes, self.stages, strict=True)):
            entering = [
                resize(lateral(features), size, align_corners=False)
                for lateral, features, entry in zip(self.lateral, maps, self.entries, strict=True)
                if entry == stage
            ]
            picture = sum(entering) if picture is None else sum(entering, start=picture)
            following = self.image_size if stage + 1 == len(self.stages) else self.stage_sizes[stage + 1]
            picture = resize(blocks(picture), following, align_corners=False)
        return self.image(picture)


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with batch norm and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))
