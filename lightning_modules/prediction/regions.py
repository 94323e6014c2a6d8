"""The regions of a map that lie above a threshold, in pixels of the photograph, and COCO's way to write them down."""

from __future__ import annotations

from collections.abc import Sequence
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
        mask: bool (height, width), its pixels inside the box.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mask: np.ndarray


def find_regions(values: np.ndarray, threshold: float) -> list[Region]:
    """The regions of a map (H, W) with values above the threshold, the highest peak first."""
    above = (values > threshold).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8, ltype=cv2.CV_32S)
    regions = []
    for number in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[number])
        inside = slice(top, top + height), slice(left, left + width)
        mask = labels[inside] == number
        regions.append(Region((left, top, width, height), area, float(values[inside][mask].max()), mask))
    return sorted(regions, key=lambda region: -region.peak)


def contours(regions: Sequence[Region]) -> list[np.ndarray]:
    """The outlines of regions, outer and inner ones, each int32 (n, 1, 2): x and y of pixels of the photograph."""
    found = []
    for region in regions:
        lines, _ = cv2.findContours(
            region.mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=region.box[:2]
        )
        found += lines
    return found


def run_lengths(region: Region, size: tuple[int, int]) -> list[int]:
    """COCO's uncompressed run-length code of a region in a photograph of (height, width) `size`.

    Counts of pixels outside, inside, outside, ... column by column.
    """
    left, top, width, height = region.box
    padded = np.zeros((width, height + 2), np.int8)
    padded[:, 1:-1] = region.mask.T
    steps = np.diff(padded, axis=1)  # of each column: +1 where a run begins, -1 after its end
    columns, rows = np.nonzero(steps)
    edges = (left + columns.astype(np.int64)) * size[0] + top + rows
    together = np.flatnonzero(edges[1:-1:2] == edges[2::2])  # a run from a column's bottom to the next one's top
    edges = np.delete(edges, np.concatenate([2 * together + 1, 2 * together + 2]))
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]])).tolist()
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
        "segmentation": {"size": list(size), "counts": run_lengths(region, size)},
        "iscrowd": 1,
    }
