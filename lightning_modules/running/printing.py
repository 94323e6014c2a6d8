"""The table that a run prints when it has been scored."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape

from lightning_modules.metrics import rendering

HEADINGS = {
    **rendering.HEADINGS,
    "image_auroc_structural": "struc\nAUROC",
    "image_auroc_logical": "logic\nAUROC",
    "pixel_auspro_mean": "AU-\nsPRO",
}
SHOWN = (
    "image_auroc",
    "image_auroc_structural",
    "image_auroc_logical",
    "image_ap",
    "pixel_auroc",
    "pixel_ap",
    "pixel_aupro",
    "pixel_auspro_mean",
    "dsc",
    "seg_f1",
    "seg_f1_images",
)
"""Columns of the table printed after an evaluation; the record holds all metrics."""
OF_SOME_DATA = ("image_auroc_structural", "image_auroc_logical", "pixel_auspro_mean")
"""Columns left out where a category has nothing of their kind."""


def _shown(metrics: pd.Series) -> list[str]:
    """The columns, with every limit of AU-PRO that was computed."""
    limits = [name for name in dict.fromkeys(metrics) if name.startswith("pixel_aupro")]
    place = SHOWN.index("pixel_aupro")
    return [*SHOWN[:place], *limits, *SHOWN[place + 1 :]]


def print_metrics(table: pd.DataFrame) -> None:
    """Prints the per-category metrics in percent, the means below, and why a number is missing."""
    console = Console()
    console.print()  # a progress bar may have left its line open
    reasons: dict[str, None] = {}
    for variant, rows in table.groupby("variant", sort=False):
        pooled = "; pooled = one ranking over all" if (rows.scope == "pooled").any() else ""
        of_categories = rows[rows.scope == "category"]
        defined = of_categories.groupby("metric").value.count()
        everywhere = set(defined.index[defined == len(of_categories[["dataset", "category"]].drop_duplicates())])
        columns = [c for c in _shown(rows.metric) if c in (everywhere if c in OF_SOME_DATA else set(rows.metric))]
        caption = f"percent; mean = unweighted over categories{pooled}"
        shown = rendering.render(rows.assign(variant=""), columns, HEADINGS, caption)
        shown.title = variant or None
        console.print(shown)
        missing = rows[rows.metric.isin(columns) & rows.reason.fillna("").ne("")]
        for keys, group in missing.groupby(["scope", "dataset", "category"], sort=False):
            reasons |= dict.fromkeys(f"{rendering.title(*keys)}: {reason}" for reason in group.reason.unique())
    for reason in reasons:
        console.print(f"- {escape(reason)}", highlight=False)
