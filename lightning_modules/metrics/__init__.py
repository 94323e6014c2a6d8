"""Exact metrics of anomaly detection and segmentation; usable without Lightning.

>>> metrics = AnomalyMetrics()
>>> metrics.update(maps, masks, image_scores, labels, categories, ids)
>>> metrics.compute().table
"""

from .definitions import IMAGE_METRICS, METRICS, PIXEL_METRICS, VERSION
from .metric import AnomalyMetrics, MetricResult
from .regions import RegionCache, Regions, find_regions
from .version import __version__

__all__ = [
    "IMAGE_METRICS",
    "METRICS",
    "PIXEL_METRICS",
    "VERSION",
    "AnomalyMetrics",
    "MetricResult",
    "RegionCache",
    "Regions",
    "__version__",
    "find_regions",
]
