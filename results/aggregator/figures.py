"""Figures in one style: ablation bars with the seeds as dots, curves, ours against published, cost against quality."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from results.aggregator.curves import cell_curves, mean_curve, with_history
from results.aggregator.history import DETECTION, HELD_OUT, LOCALISATION, LOSS, Curve, read_curve
from results.aggregator.methods_table import Ranks
from results.aggregator.names import COSTS, category_label, method_label, metric_label
from results.aggregator.records import StoredRecord
from results.aggregator.scores import OF, Pool, Query, cost, seed_means
from results.aggregator.spec import Spec
from results.aggregator.sweep_cells import SweepCells
from results.aggregator.table import Cell, Table

matplotlib.use("Agg")

BLUE, RED, GREEN, GREY, ORANGE = "#2b6cb0", "#c0392b", "#2e8b57", "#8a8f98", "#d98218"
SHARES = (ORANGE, GREY)
STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e3e6ea", "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 9,
    "axes.titleweight": "bold", "axes.edgecolor": "#5b6470", "legend.frameon": False, "svg.hashsalt": "unirecon",
    "svg.fonttype": "path",
}  # fmt: skip


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF by its suffix; the same figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata=_metadata(path.suffix))
    return path


def svg(figure: Figure) -> str:
    """The figure as an SVG document, its text as outlines."""
    stream = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata=_metadata(".svg"))
    return stream.getvalue()


def _metadata(suffix: str) -> dict[str, None]:
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})


def curves_figure(spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None = None) -> Figure:
    """One panel per cell: training loss (blue, log axis), localisation (red) and detection (green) AUROC over epochs.

    Thin lines are the seeds, the thick one their mean. The spec's `shares` are drawn on the axis of the AUROCs.
    """
    shares = dict(zip(spec.shares, SHARES, strict=False))
    cells = [(label, mine) for label, mine in cell_curves(spec, with_history(records)[0], sweep) if mine]
    columns = min(3, max(1, len(cells)))
    lines = max(1, -(-len(cells) // columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(3.3 * columns, 2.5 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axis in grid.flat[len(cells) :]:
            axis.set_axis_off()
        for number, (axis, (label, mine)) in enumerate(zip(grid.flat, cells, strict=False)):
            right = axis.twinx()
            right.spines["right"].set_visible(True)
            right.grid(False)
            for target, name, colour, scale in (
                (axis, LOSS, BLUE, 1.0), (right, LOCALISATION, RED, 100.0), (right, DETECTION, GREEN, 100.0),
                *((right, name, colour, 100.0) for name, colour in shares.items()),
            ):  # fmt: skip
                found = [curve for curve in (read_curve(stored, name) for stored in mine) if curve is not None]
                _draw_curve(target, found, colour, scale, log=name == LOSS)
            loss_axis(axis)
            axis.set_title(label)
            axis.set_xlabel("epoch")
            axis.tick_params(axis="y", colors=BLUE)
            if shares:
                right.set_ylim(-2, 101)
            else:  # each panel shows its own range, so that small changes can be seen
                low, high = right.dataLim.y0, right.dataLim.y1
                room = max(0.08 * (high - low), 0.5)
                right.set_ylim(low - room, min(101.0, high + room))
            if number % columns == 0:
                axis.set_ylabel("training loss", color=BLUE)
            if number % columns == columns - 1 or number == len(cells) - 1:
                right.set_ylabel("; ".join(["test AUROC [%]", *(f"{text} [%]" for text in spec.shares.values())]))
        handles = [matplotlib.lines.Line2D([], [], color=c, lw=2) for c in (BLUE, RED, GREEN, *shares.values())]
        texts = ["training loss", "localisation (pixel AUROC)", "detection (image AUROC)", *spec.shares.values()]
        figure.legend(handles, texts, loc="outside lower center", ncols=len(texts))
    return figure


def run_figure(stored: StoredRecord) -> Figure | None:
    """A run's training loss (log axis) and, where they were recorded, its losses on held-out images and test AUROCs by epoch.

    None if nothing was recorded over more than one epoch.
    """
    losses = [
        (read_curve(stored, LOSS), BLUE, "training"),
        (read_curve(stored, HELD_OUT), GREY, "held-out normal images"),
    ]
    scores = [
        (read_curve(stored, DETECTION), GREEN, "image AUROC"),
        (read_curve(stored, LOCALISATION), RED, "pixel AUROC"),
    ]
    panels = [
        [(curve, colour, label) for curve, colour, label in panel if curve is not None and len(curve.epochs) > 1]
        for panel in (losses, scores)
    ]
    panels = [panel for panel in panels if panel]
    if not panels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 2.5), layout="constrained")
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            loss = panel[0][2] in ("training", "held-out normal images")
            for curve, colour, label in panel:
                _draw_curve(axis, [curve], colour, 1.0 if loss else 100.0, log=loss)
                axis.lines[-1].set_label(label)
            if loss:
                loss_axis(axis)
            axis.set_title("loss" if loss else "test AUROC [%]")
            axis.set_xlabel("epoch")
            axis.legend()
    return figure


def loss_axis(axis: Any) -> None:
    """A log axis for a loss, its ticks as plain numbers: 0.2, 0.5, 1, also where it spans less than a decade."""
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    low, high = axis.get_ylim()
    if 0 < high < 2.5 * low:  # between two of those ticks: ticks at equal steps
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _plain_ticks(axis: Any) -> None:
    """Ticks of a log axis at 1, 2, 5, 10, ... as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(axis: Any, curves: Sequence[Curve], colour: str, scale: float, log: bool) -> None:
    for curve in curves:
        positive = [max(value, 1e-12) * scale if log else value * scale for value in curve.values]
        axis.plot(curve.epochs, positive, color=colour, lw=0.7, alpha=0.35 if len(curves) > 1 else 0.0)
    if curves:
        mean = mean_curve(curves)
        values = [max(value, 1e-12) * scale if log else value * scale for value in mean.values]
        axis.plot(mean.epochs, values, color=colour, lw=1.8, marker="o" if len(values) < 3 else None, ms=3)


def ablation_bars(table: Table, records: Sequence[StoredRecord]) -> Figure:
    """A panel per ranked metric, a bar per row (the default row darker), each seed's mean over categories as a dot."""
    shown = [
        (j, column)
        for j, column in enumerate(table.columns)
        if column.ranked and any(row[j].ours is not None for row in table.cells)
    ][:4]
    by_name = {stored.name: stored for stored in records}
    labels = [name + (" ★" if row.default else "") for name, row in zip(_names(table), table.rows, strict=True)]
    with rc_context(STYLE):
        height = 0.9 + 0.3 * len(table.rows)
        figure = Figure(figsize=(2.2 + 2.6 * max(1, len(shown)), height), layout="constrained")
        axes = figure.subplots(1, max(1, len(shown)), squeeze=False, sharey=True)[0]
        for axis, (j, column) in zip(axes, shown, strict=False):
            everything: list[float] = []
            for i, row in enumerate(table.cells):
                value = row[j].runs
                if value is None or value.mean is None:
                    axis.text(0.04, i, "no run", transform=axis.get_yaxis_transform(), va="center", color=GREY, size=7)
                    continue
                colour = BLUE if table.rows[i].default else "#9dbfe0"
                axis.barh(i, value.mean, color=colour, height=0.62)
                dots = _seed_dots([by_name[name] for name in value.records if name in by_name], row[j])
                axis.plot(dots, [i] * len(dots), "o", ms=3.5, mfc="white", mec="#1d2733", mew=0.8)
                everything += [value.mean, *dots]
            if everything:
                low, high = min(everything), max(everything)
                margin = max(0.15 * (high - low), 0.5)
                axis.set_xlim(max(0.0, low - 2 * margin), min(100.5, high + margin))
            axis.set_title(f"{column.group} {column.label}".strip() + " [%]")
            axis.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].invert_yaxis()
        of_rows = " · ".join(filter(None, table.row_headers))
        said = f"rows: {of_rows}; " if of_rows else ""
        figure.supxlabel(f"{said}axis does not start at zero; dots: seeds", size=7, color=GREY)
    return figure


def _names(table: Table) -> list[str]:
    """The rows' names, with their groups where two rows would have the same one."""
    names = [" · ".join(filter(None, row.labels)) for row in table.rows]
    if len(set(names)) < len(names):
        names = [": ".join(filter(None, (row.group, name))) for row, name in zip(table.rows, names, strict=True)]
    return names


def sweep_figure(spec: Spec, table: Table, records: Sequence[StoredRecord]) -> Figure:
    """The figure of a sweep's table: lines over the spec's `x` where it has one, else bars."""
    return lines_figure(spec, table, records) if spec.kind == "lines" else ablation_bars(table, records)


def lines_figure(spec: Spec, table: Table, records: Sequence[StoredRecord]) -> Figure:
    """A panel per ranked column: the score over the spec's `x`, a line per combination of the other parameters.

    Dots are the seeds, the line is their mean. Values of `x` stand at equal distances, in the table's order. Lines that are equal
    everywhere, as of a method that does not heed a parameter, are one.
    """
    label = str(spec.parameters[spec.x].get("label", spec.x))
    place = table.row_headers.index(label)
    rows = [(i, row) for i, row in enumerate(table.rows) if place < len(row.labels) and row.labels[place]]
    ticks = list(dict.fromkeys(row.labels[place] for _, row in rows))
    lines: dict[str, list[tuple[int, int]]] = {}
    for i, row in rows:
        name = ", ".join(text for n, text in enumerate(row.labels) if n != place and text) or table.title
        lines.setdefault(name, []).append((ticks.index(row.labels[place]), i))
    shown = [
        (j, column)
        for j, column in enumerate(table.columns)
        if column.ranked and any(table.cells[i][j].ours is not None for i, _ in rows)
    ]
    lines = _equal_joined(lines, table, [j for j, _ in shown])
    by_name, pool = {stored.name: stored for stored in records}, Pool(records)
    colours = (BLUE, RED, GREEN, ORANGE, GREY)
    with rc_context(STYLE):
        across = min(3, max(1, len(shown)))
        down = -(-max(1, len(shown)) // across)
        figure = Figure(figsize=(3.1 * across, 2.7 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        for axis, (j, column) in zip(axes.flat, shown, strict=False):
            for number, (name, points) in enumerate(lines.items()):
                found = [(x, table.cells[i][j]) for x, i in points if table.cells[i][j].ours is not None]
                if not found:
                    continue
                style = {"color": colours[number % len(colours)], "ls": ("-", "--", ":")[number // len(colours) % 3]}
                axis.plot([x for x, _ in found], [cell.ours for _, cell in found], lw=1.6, label=name, **style)
                for x, cell in found:
                    mine = [by_name[name] for name in cell.main.records if name in by_name]
                    dots = _seed_dots(mine, cell, _restricted(pool, cell))
                    axis.plot([x] * len(dots), dots, "o", ms=3, color=style["color"], alpha=0.6)
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_title(f"{column.group} {column.label}".strip() + " [%]")
            axis.set_xlabel(label)
        handles, texts = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=min(3, max(1, len(texts))))
    return figure


def _equal_joined(
    lines: dict[str, list[tuple[int, int]]], table: Table, columns: Sequence[int]
) -> dict[str, list[tuple[int, int]]]:
    """The lines by name, those with the same values everywhere once, named by what their names have in common."""
    found: dict[tuple, list[str]] = {}
    for name, points in lines.items():
        found.setdefault(tuple((x, table.cells[i][j].ours) for x, i in points for j in columns), []).append(name)
    joined = {}
    for same in found.values():
        common = [part for part in same[0].split(", ") if all(part in name.split(", ") for name in same)]
        joined[", ".join(common) or " = ".join(same)] = lines[same[0]]
    return joined


def _restricted(pool: Pool, cell: Cell) -> tuple[str, ...]:
    """The categories of a number that is a mean over some of them; () for one over all."""
    category = cell.key["category"]
    return pool.needed(Query(cell.key["metric"], cell.key["dataset"], category)) if category.startswith(OF) else ()


def _seed_dots(records: Sequence[StoredRecord], cell: Cell, categories: Sequence[str] = ()) -> list[float]:
    """The seeds' means over categories (all of them if none is named) in percent, of the variant that the cell's number is of."""
    if not records:
        return []
    query = Query(cell.key["metric"], cell.key["dataset"], variant=cell.variant)
    seeds = [
        {name: value for name, value in values.items() if not categories or name in categories}
        for values in seed_means(records, query).values()
    ]
    return [100 * sum(values.values()) / len(values) for values in seeds if values]


def against_published(table: Table, metric: str) -> Figure | None:
    """A dot per category, ours (filled, whisker: std) against the paper's (ring); None if no category has both."""
    pairs: list[tuple[str, float, float, float | None]] = []
    for row, line in zip(table.rows, table.cells, strict=True):
        for column, cell in zip(table.columns, line, strict=True):
            theirs, ours = cell.published, cell.runs
            if column.metric != metric or theirs is None or ours is None:
                continue
            if theirs.mean is not None and ours.mean is not None:
                method = f"{column.group} {column.label}".strip()
                pairs.append((f"{category_label(row.labels[0])} · {method}", theirs.mean, ours.mean, ours.std))
    if not pairs:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.8 + 0.24 * len(pairs)), layout="constrained")
        axis = figure.subplots()
        for i, (_, printed, mean, std) in enumerate(pairs):
            axis.plot([printed, mean], [i, i], color="#c9ced6", lw=2, zorder=1)
            axis.errorbar(mean, i, xerr=std, fmt="o", color=BLUE, ms=5, capsize=2, zorder=3)
            axis.plot(printed, i, "o", mfc="white", mec=RED, mew=1.4, ms=6, zorder=2)
        axis.set_yticks(range(len(pairs)), [label for label, *_ in pairs])
        axis.invert_yaxis()
        axis.set_xlabel(f"{metric_label(metric)} [%]")
        handles = [
            matplotlib.lines.Line2D([], [], ls="", marker="o", color=BLUE),
            matplotlib.lines.Line2D([], [], ls="", marker="o", mfc="white", mec=RED),
        ]
        figure.legend(handles, ["our runs", "printed"], loc="outside lower center", ncols=2)
    return figure


def cost_against_quality(table: Table, records: Sequence[StoredRecord], metric: str, price: str) -> Figure | None:
    """A point per row: a cost against a score; None if fewer than two rows state both or the cost is alike."""
    by_name = {stored.name: stored for stored in records}
    index = next((j for j, c in enumerate(table.columns) if c.metric == metric), None)
    points: list[tuple[float, float, float | None, str, bool]] = []
    alone = [row.labels[0] for row in table.rows]
    labels = alone if len(set(alone)) == len(alone) else _names(table)
    for name, row, line in zip(labels, table.rows, table.cells, strict=True):
        value = line[index].runs if index is not None else None
        if value is None or value.mean is None:
            continue
        stated = [cost(by_name[run], price) for run in value.records if run in by_name]
        prices = [each for each in stated if each is not None]
        if prices and len(prices) == len(stated):
            points.append((sum(prices) / len(prices), value.mean, value.std, name, row.default))
    if len(points) < 2:
        return None
    prices = [point[0] for point in points]
    if max(prices) <= 1.2 * min(prices):  # the same cost but for noise: nothing to weigh
        return None
    label, unit, _ = COSTS[price]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axis = figure.subplots()
        for x, y, std, _, default in points:
            style: dict[str, Any] = {"fmt": "*", "ms": 10} if default else {"fmt": "o", "ms": 5}
            axis.errorbar(x, y, yerr=std, color=BLUE, capsize=2, elinewidth=0.8, **style)
        if 0 < 4 * min(prices) < max(prices):  # methods without training have no parameters
            axis.set_xscale("log")
            _plain_ticks(axis.xaxis)
        axis.margins(x=0.3, y=0.15)
        _label_points(axis, [(x, y, text) for x, y, _, text, _ in points])
        axis.set_xlabel(f"{label} [{unit}]")
        axis.set_ylabel(f"{metric_label(metric)} [%]")
    return figure


def _label_points(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points at their right; a name that would lie on another is moved up, with a line to its point."""
    limits = axis.get_xlim(), axis.get_ylim()
    inside = axis.transData + axis.transAxes.inverted()
    taken: list[tuple[float, float, float]] = []
    for x, y, text in sorted(points, key=lambda each: each[1]):
        left, at = inside.transform((x, y))
        right, height = left + 0.03 + 0.016 * len(text), at
        while any(abs(height - other) < 0.045 and left < end and start < right for start, end, other in taken):
            height += 0.01
        taken.append((left, right, height))
        if height > at:
            axis.plot([left, left], [at, height], color=GREY, lw=0.5, zorder=1, transform=axis.transAxes)
        box = {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.3}  # over error bars
        axis.text(left + 0.02, height, text, size=7, va="center", bbox=box, transform=axis.transAxes)
    axis.set(xlim=limits[0], ylim=limits[1])


def critical_difference(ranks: Ranks) -> Figure:
    """Average ranks on an axis (the best at the left); a bar joins methods that do not differ significantly."""
    count = len(ranks.methods)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.8, 1.5 + 0.2 * count), layout="constrained")
        axis = figure.subplots()
        height = -(-count // 2)
        for number, (method, rank) in enumerate(zip(ranks.methods, ranks.average, strict=True)):
            left = number < height
            depth = -1.0 - (number if left else count - 1 - number)
            end = 0.6 if left else count + 0.4
            axis.plot([rank, rank, end], [0, depth, depth], color=GREY, lw=0.9)
            axis.plot(rank, 0, "o", color=BLUE, ms=4)
            text = f"{method_label(method)} ({rank:.2f})"
            axis.text(
                end, depth, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center", size=7.5
            )
        top = 0.45
        reached = -1
        for first, rank in enumerate(ranks.average):
            last = max(i for i, other in enumerate(ranks.average) if other - rank <= ranks.critical)
            if last > first and last > reached:
                axis.plot(
                    [rank - 0.03, ranks.average[last] + 0.03], [top, top], color=RED, lw=2.4, solid_capstyle="butt"
                )
                top += 0.35
                reached = last
        axis.plot([1, 1 + ranks.critical], [top + 0.6] * 2, color="#1d2733", lw=1.4, marker="|", ms=6)
        axis.text(1 + ranks.critical / 2, top + 0.75, f"critical difference {ranks.critical:.2f}", ha="center", size=7)
        axis.set_ylim(-1.6 - height, top + 1.4)
        axis.set_xlim(-1.2, count + 2.2)
        axis.set_yticks([])
        axis.grid(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        axis.set_xticks([])
        axis.plot([1, count], [0, 0], color="#1d2733", lw=1.0, zorder=0)
        figure.suptitle(f"Average rank over {ranks.categories} categories, {metric_label(ranks.metric)}", size=9)
    return figure
