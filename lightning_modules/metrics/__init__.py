"""Exact metrics of anomaly detection and segmentation; usable without Lightning.

>>> metrics = AnomalyMetrics()
>>> metrics.update(maps, masks, image_scores, labels, categories, ids)
>>> metrics.compute().table
"""

from .definitions import IMAGE_METRICS, METRICS, PIXEL_METRICS, VERSION
from .metric import AnomalyMetrics, MetricResult
from .regions import RegionCache, Regions, find_regions
from .segmentation import SEGMENTATION_METRICS
from .thresholds import (
    RULES,
    PixelCollector,
    PixelStatistics,
    RateError,
    Threshold,
    images_needed,
    lowest_rate,
    p_values,
    threshold,
)
from .version import __version__

__all__ = [
    "IMAGE_METRICS",
    "METRICS",
    "PIXEL_METRICS",
    "RULES",
    "SEGMENTATION_METRICS",
    "VERSION",
    "AnomalyMetrics",
    "MetricResult",
    "PixelCollector",
    "PixelStatistics",
    "RateError",
    "RegionCache",
    "Regions",
    "Threshold",
    "__version__",
    "find_regions",
    "images_needed",
    "lowest_rate",
    "p_values",
    "threshold",
]
