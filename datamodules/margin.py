"""What a centre crop cuts off the masks of defects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from datamodules.images import centre
from datamodules.problems import number_of


@dataclass(frozen=True)
class Margin:
    """Defects in the margin of a crop, counted at the size before it.

    Attributes:
        images: images with a mask that marks something.
        cut: those that lose a part of it, but not all.
        lost: those that lose all of it.
        pixels: defective pixels.
        cut_pixels: those in the margin.
    """

    images: int
    cut: int
    lost: int
    pixels: int
    cut_pixels: int

    def sentence(self, whole: tuple[int, int], size: tuple[int, int]) -> str:
        """For people; `whole` and `size` are (height, width) before and after the crop."""
        share = self.cut_pixels / max(1, self.pixels)
        return (
            f"the centre of {size[1]} x {size[0]} of {whole[1]} x {whole[0]} pixels is kept: the margin holds "
            f"{self.cut_pixels:,} of {self.pixels:,} defective pixels ({share:.1%}); of "
            f"{number_of(self.images, 'image')} with a mask, {self.lost} lose the whole defect (they count as anomalous "
            f"without a marked pixel) and {self.cut} a part of it"
        )


def kept(mask: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """(defective pixels, those in the central (height, width) `size`) of a mask, bool (H, W)."""
    return int(mask.sum()), int(centre(mask, size).sum())


def margin(counts: Iterable[tuple[int, int]]) -> Margin:
    """The sum over images of what `kept` counts; masks that mark nothing are left out."""
    marked = [(whole, inside) for whole, inside in counts if whole]
    return Margin(
        images=len(marked),
        cut=sum(0 < inside < whole for whole, inside in marked),
        lost=sum(inside == 0 for _, inside in marked),
        pixels=sum(whole for whole, _ in marked),
        cut_pixels=sum(whole - inside for whole, inside in marked),
    )
