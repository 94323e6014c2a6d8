"""The table a person reads: percent, one row per category, then the means and the pooled values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from rich.markup import escape
from rich.table import Table

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


def main_metrics(rows: pd.DataFrame) -> list[str]:
    """The metrics of a result's rows that have a heading, every limit of AU-PRO among them; all of them if none has."""
    named = list(dict.fromkeys(rows.metric))
    return [name for name in named if name in HEADINGS or name.startswith("pixel_aupro")] or named


def render(
    rows: pd.DataFrame, metrics: Sequence[str], headings: Mapping[str, str] = HEADINGS, caption: str = "percent"
) -> Table:
    """Rich table of some metrics of a result; a dash stands for an undefined value.

    Args:
        rows: A result's `table`, or the rows of one of its variants.
        metrics: The columns, in order.
        headings: Of the columns; see `heading`.
        caption: Below the table.
    """
    of_categories = rows[rows.scope == "category"]
    several = of_categories.dataset.nunique() > 1
    keys = of_categories[["dataset", "category"]].drop_duplicates()
    shared = set(keys.category[keys.category.duplicated()])  # one name in two data sets
    table = Table(caption=caption)
    table.add_column("category", no_wrap=True)
    table.add_column("images", justify="right")
    for name in metrics:
        table.add_column(heading(name, headings), justify="right")
    previous = None
    for (variant, scope, dataset, category), part in rows.groupby(
        ["variant", "scope", "dataset", "category"], sort=False
    ):
        if scope != "category" and dataset and not several:
            continue  # the same as over all data sets
        if previous not in (None, scope):
            table.add_section()
        previous = scope
        values = part.set_index("metric").value
        counts = f"{part.n.max()}" if scope != "mean" else f"{part.n.min()} cat."
        cells = ["-" if pd.isna(values.get(name)) else f"{100 * values[name]:.2f}" for name in metrics]
        table.add_row(escape(f"{variant} {title(scope, dataset, category, shared)}".strip()), counts, *cells)
    return table


def title(scope: str, dataset: str, category: str, shared: Collection[str] = ()) -> str:
    """What a row is of: a category, with its data set where two have one of that name, or the mean or ranking of some."""
    if category:
        return f"{dataset}/{category}" if category in shared else category
    return f"{scope} of {dataset}" if dataset else scope
