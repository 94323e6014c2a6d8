"""The table a person reads: percent, one row per category, then the mean and the pooled values."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from .metric import MetricResult

HEADINGS = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1max": "image\nF1-max",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1max": "pixel\nF1-max",
    "pixel_aupro": "pixel\nAUPRO",
    "dsc": "DSC",
    "dsc_floor_nothing": "DSC of\nnothing",
    "dsc_f1max": "DSC at\nF1-max",
    "iou": "IoU",
    "seg_f1": "SegF1",
    "seg_f1_images": "SegF1\nper image",
}


def heading(name: str, headings: Mapping[str, str] = HEADINGS) -> str:
    """Heading of a metric's column; that of an AU-PRO states its limit unless it is 0.3."""
    return headings.get(name, name.replace("pixel_aupro_", "AUPRO\n@"))


def render(result: MetricResult) -> Table:
    """Rich table of the main metrics of a result; a dash stands for an undefined value."""
    rows = result.table
    metrics = [name for name in dict.fromkeys(rows.metric) if name in HEADINGS or name.startswith("pixel_aupro")]
    metrics = metrics or list(dict.fromkeys(rows.metric))
    named = rows.dataset.nunique() > 2  # a dataset beside "all of them"
    table = Table(caption=f"percent; metric definitions version {result.version}")
    table.add_column("category")
    table.add_column("images", justify="right")
    for name in metrics:
        table.add_column(heading(name), justify="right")
    previous = None
    for (variant, scope, dataset, category), part in rows.groupby(
        ["variant", "scope", "dataset", "category"], sort=False
    ):
        if scope != "category" and dataset and not named:
            continue
        if previous not in (None, scope):
            table.add_section()
        previous = scope
        title = category or f"{scope} ({dataset or 'all'})"
        values = part.set_index("metric").value
        counts = f"{part.n.max()}" if scope != "mean" else f"{part.n.min()} cat."
        cells = ["-" if math.isnan(values.get(name, math.nan)) else f"{100 * values[name]:.2f}" for name in metrics]
        table.add_row(f"{variant} {title}".strip(), counts, *cells)
    return table
