"""The regions of a map that lie above a threshold, in pixels of the photograph, and COCO's way to write them down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np


@dataclass(frozen=True)
class Region:
    """Connected pixels (8 neighbours) of a photograph.

    Args:
        box: Left, top, width and height in pixels.
        area: Number of pixels.
        peak: Highest value of the map inside.
        runs: COCO's uncompressed run-length code, int64: numbers of pixels outside, inside, outside, ..., column by column over
            the whole photograph.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    runs: np.ndarray


def find_regions(values: np.ndarray, threshold: float) -> list[Region]:
    """The regions of a map (H, W) with values above the threshold, the highest peak first."""
    above = (values > threshold).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8, ltype=cv2.CV_32S)
    regions = []
    for number in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[number])
        inside = slice(top, top + height), slice(left, left + width)
        mask = labels[inside] == number
        runs = run_lengths(mask, left, top, values.shape)  # a mask of every region would not fit into memory
        regions.append(Region((left, top, width, height), area, float(values[inside][mask].max()), runs))
    return sorted(regions, key=lambda region: -region.peak)


def run_lengths(mask: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The code of `Region` for a mask (h, w) with its corner at `left` and `top` in a photograph of (height, width) `size`."""
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    padded[:, 1:-1] = mask.T
    steps = np.diff(padded, axis=1)  # of each column: +1 where a run begins, -1 after its end
    columns, rows = np.nonzero(steps)
    edges = (left + columns.astype(np.int64)) * size[0] + top + rows
    together = np.flatnonzero(edges[1:-1:2] == edges[2::2])  # a run from a column's bottom to the next one's top
    edges = np.delete(edges, np.concatenate([2 * together + 1, 2 * together + 2]))
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]]))
    return counts if counts[-1] else counts[:-1]


def annotation(region: Region, size: tuple[int, int], **ids: int) -> dict[str, Any]:
    """A region as an entry of COCO's `annotations`; `ids` are id, image_id and category_id.

    The mask is a run-length code, exact to the pixel and with its holes, as COCO writes masks with `iscrowd` 1.
    """
    return {
        **ids,
        "bbox": list(region.box),
        "area": region.area,
        "score": region.peak,
        "segmentation": {"size": list(size), "counts": region.runs.tolist()},
        "iscrowd": 1,
    }
