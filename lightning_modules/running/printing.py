"""The table that a run prints when it has been scored."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.metrics import rendering
from results.common.pair import label

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
    reasons: dict[str, None] = {}
    for variant, rows in table.groupby("variant", sort=False):
        pooled = "; pooled = one ranking over all" if (rows.scope == "pooled").any() else ""
        shown = Table(title=variant or None, caption=f"percent; mean = unweighted over categories{pooled}")
        shown.add_column("category", no_wrap=True)
        of_categories = rows[rows.scope == "category"]
        defined = of_categories.groupby("metric").value.count()
        keys = of_categories[["dataset", "category"]].drop_duplicates()
        everywhere = set(defined.index[defined == len(keys)])
        shared = set(keys.category[keys.category.duplicated()])  # the same name in two data sets
        columns = [c for c in _shown(rows.metric) if c in (everywhere if c in OF_SOME_DATA else set(rows.metric))]
        for name in columns:
            shown.add_column(rendering.heading(name, HEADINGS), justify="right")
        for (scope, dataset, category), group in rows.groupby(["scope", "dataset", "category"], sort=False):
            if dataset and not category and rows.dataset[rows.scope == "category"].nunique() == 1:
                continue  # the same as over all datasets
            values = group.set_index("metric").value
            title = category or f"{scope}{f' of {dataset}' if dataset else ''}"
            title = label(dataset, category) if category in shared else title
            shown.add_row(
                escape(title), *("-" if pd.isna(values.get(c)) else f"{100 * values[c]:.2f}" for c in columns)
            )
            reasons |= dict.fromkeys(
                f"{title}: {r}" for r in group[group.metric.isin(columns)].reason.dropna().unique() if r
            )
        console.print(shown)
    for reason in reasons:
        console.print(f"- {escape(reason)}", highlight=False)
