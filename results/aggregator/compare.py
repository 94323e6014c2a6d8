"""Is A better than B? Paired over the seeds and the categories that both have, with the honest n."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from results.aggregator.names import METHODS, metric_label
from results.aggregator.records import StoredRecord
from results.aggregator.render import markdown_frame
from results.aggregator.scores import (
    METHOD_AXES,
    ConflictError,
    Query,
    axis_value,
    check_cell,
    check_table,
    options_of,
    seed_means,
    versions,
)
from results.aggregator.sweep_cells import canonical, show_value
from results.common.did_you_mean import did_you_mean

_SAID = ("model.class_path", "model.init_args.backbone", "model.init_args.image_size", "data.init_args.image_size",
         "data.init_args.resize", "data.init_args.setting")  # fmt: skip
"""Options that the sentence before says in a reader's words."""


@dataclass(frozen=True)
class Paired:
    """A paired comparison over one kind of unit. Differences are A minus B in points of percent.

    `n` counts the units, `p_t` and `p_wilcoxon` are two-sided, None where a test is impossible (n < 2, or no spread).
    `effect` is Cohen's d_z (mean over standard deviation of the differences), `rank` the matched rank-biserial
    correlation in [-1, 1]. `interval` is the 95 % t interval of the mean difference. `smallest` is the smallest p that
    the Wilcoxon test can give at this n.
    """

    unit: str
    n: int
    difference: float
    interval: tuple[float, float] | None
    p_t: float | None
    p_wilcoxon: float | None
    effect: float | None
    rank: float | None
    smallest: float
    wins: int
    losses: int
    differences: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """Two selections compared on one metric of one data set; `notes` says what must not be concluded."""

    a: str
    b: str
    metric: str
    dataset: str
    mean_a: float
    mean_b: float
    seeds: tuple[int, ...]
    categories: tuple[str, ...]
    over_categories: Paired
    over_seeds: Paired
    notes: tuple[str, ...]


def choose(records: Sequence[StoredRecord], selector: str) -> list[StoredRecord]:
    """The records that a selector names.

    `uniad` (a method's trainings outside of sweeps), `sweep/run*` (runs by name), `sweep:key=value,key=value` (a
    cell; the last part of a key is enough). Raises ValueError with what there is if nothing fits.
    """
    sweep, colon, text = selector.partition(":")
    if colon:
        mine = [stored for stored in records if stored.record.sweep == sweep]
        if not mine:
            raise ValueError(f"no records of sweep {sweep!r}. {did_you_mean(sweep, {s.record.sweep for s in records})}")
        for condition in _split_conditions(text):
            key, equals, value = condition.partition("=")
            if not equals:
                raise ValueError(f"{selector!r}: {condition!r} must be key=value")
            known = sorted({name for stored in mine for name in stored.record.cell})
            names = [name for name in known if name == key or name.endswith(f".{key}")]
            if len(names) != 1:
                close = did_you_mean(key, [name.rpartition(".")[2] for name in known])
                raise ValueError(f"{selector!r}: {key!r} is not one parameter of {sweep}. {close}")
            found = [s for s in mine if canonical(s.record.cell.get(names[0])) == canonical(value)]
            if not found:
                values = sorted({str(stored.record.cell.get(names[0])) for stored in mine})
                raise ValueError(f"{selector!r}: no run with {key}={value}; there are {', '.join(values)}")
            mine = found
        return mine
    if "/" in selector:
        import fnmatch

        mine = [stored for stored in records if fnmatch.fnmatchcase(stored.name, selector)]
    else:
        mine = [stored for stored in records if stored.record.method == selector and not stored.record.cell]
    of_sweeps = sorted({s.record.sweep for s in records if s.record.method == selector})
    if not mine and of_sweeps:
        raise ValueError(
            f"no training of {selector} outside of sweeps; its runs belong to {', '.join(of_sweeps)}. Name them as "
            f"{of_sweeps[0]}/run* or {of_sweeps[0]}:key=value"
        )
    if not mine and selector in METHODS:
        there = ", ".join(sorted({s.record.method for s in records})) or "no method"
        raise ValueError(f"no run of {selector} is here; there are runs of {there}")
    if not mine:
        known = sorted(
            {s.record.method for s in records if not s.record.cell} | {f"{s.record.sweep}/*" for s in records}
        )
        raise ValueError(f"no records fit {selector!r}. {did_you_mean(selector, known)}")
    return mine


def compare(
    records_a: Sequence[StoredRecord],
    records_b: Sequence[StoredRecord],
    a: str,
    b: str,
    metric: str = "image_auroc",
    dataset: str | None = None,
    variant: str = "",
) -> Comparison:
    """Compare two selections; raises ConflictError or ValueError where the comparison would mean nothing."""
    both = [{d["name"] for s in records for d in s.record.datasets} for records in (records_a, records_b)]
    shared = sorted(both[0] & both[1])
    if dataset is None:
        if len(shared) != 1:
            raise ValueError(f"A and B share the data sets {', '.join(shared) or 'none'}; choose one with --dataset")
        dataset = shared[0]
    query = Query(metric, dataset, variant=variant)
    for side, selector, records in (("A", a, records_a), ("B", b, records_b)):
        try:
            check_cell(records, query)
        except ConflictError as error:
            if "/" in selector or ":" in selector:
                raise
            raise ValueError(_which(side, selector, records, error)) from error
    if {stored.name for stored in records_a} & {stored.name for stored in records_b}:
        raise ConflictError(
            [("A and B share records", {a: [s.name for s in records_a], b: [s.name for s in records_b]})]
        )
    # The recipe of a method may differ, what is measured may not.
    varies = ("backbone", "weights", "image size", "resize", "setting")
    check_table([(query, stored) for stored in (*records_a, *records_b)], varies, "one comparison")
    values_a, values_b = seed_means(records_a, query), seed_means(records_b, query)
    seeds = tuple(sorted(set(values_a) & set(values_b)))
    if not seeds:
        raise ValueError(
            f"A has seeds {sorted(values_a)}, B has {sorted(values_b)} for {metric}: none in common to pair"
        )
    by_seed = [values_a[seed] for seed in seeds] + [values_b[seed] for seed in seeds]
    categories = tuple(sorted(set.intersection(*(set(values) for values in by_seed))))
    lost = sorted(set.union(*(set(values) for values in by_seed)) - set(categories))
    if lost:
        raise ValueError(
            f"{metric} of {', '.join(lost)} is not there for every seed of A and B; comparing the rest would hide it"
        )
    grid = 100 * np.array([[values_a[s][c] - values_b[s][c] for c in categories] for s in seeds])
    over_categories = paired("category", list(zip(categories, grid.mean(axis=0), strict=True)))
    over_seeds = paired("seed", [(f"seed {s}", float(d)) for s, d in zip(seeds, grid.mean(axis=1), strict=True)])
    mean_a = 100 * statistics.fmean(values_a[s][c] for s in seeds for c in categories)
    mean_b = 100 * statistics.fmean(values_b[s][c] for s in seeds for c in categories)
    left = sorted((set(values_a) | set(values_b)) - set(seeds))
    notes = [f"Seeds without a partner, left out: {', '.join(map(str, left))}."] if left else []
    notes += _caveats(over_categories, over_seeds, records_a, records_b)
    return Comparison(
        a, b, metric, dataset, mean_a, mean_b, seeds, categories, over_categories, over_seeds, tuple(notes)
    )


def _which(side: str, method: str, records: Sequence[StoredRecord], error: ConflictError, limit: int = 8) -> str:
    """The runs of a method that are more than one experiment, the last one first, and how to name one of them."""
    last = sorted(records, key=lambda s: str(s.record.provenance.get("started") or ""), reverse=True)
    lines = [
        f"{side}={method} takes all {len(records)} runs of {method} outside of sweeps, which are not one experiment "
        f"with several seeds; they differ in {', '.join(dict.fromkeys(axis for axis, _ in error.conflicts))}:"
    ]
    for stored in last[:limit]:
        record, size = stored.record, axis_value(stored, "image size")
        commit = str(record.provenance.get("git_commit"))[:10]
        lines.append(
            f"  {stored.name}: profile {record.profile}, seed {record.seed}, image size {size}, commit {commit}"
        )
    if len(last) > limit:
        lines.append(f"  and {len(last) - limit} more")
    lines.append(f"name the one you mean, such as {side}={last[0].name}; a * in it stands for the seeds")
    return "\n".join(lines)


def paired(unit: str, differences: Sequence[tuple[str, float]]) -> Paired:
    """Paired tests of differences against zero; each difference is one independent unit (not one of many repeats)."""
    values = np.array([value for _, value in differences], dtype=float)
    n, mean = len(values), float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if n > 1 else 0.0
    interval = p_t = p_wilcoxon = effect = None
    if n > 1 and spread > 1e-12:
        half = float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
        interval = (mean - half, mean + half)
        p_t = float(stats.ttest_1samp(values, 0.0).pvalue)
        effect = mean / spread
    nonzero = values[np.abs(values) > 1e-12]
    rank = None
    if len(nonzero):
        ranks = stats.rankdata(np.abs(nonzero))
        rank = float((ranks[nonzero > 0].sum() - ranks[nonzero < 0].sum()) / ranks.sum())
        if len(nonzero) > 1:
            exact = len(nonzero) <= 25 and len(set(np.abs(nonzero))) == len(nonzero)
            p_wilcoxon = float(stats.wilcoxon(nonzero, method="exact" if exact else "approx").pvalue)
    smallest = min(1.0, 2.0 ** (1 - n))
    wins, losses = int((values > 1e-12).sum()), int((values < -1e-12).sum())
    shown = tuple((name, float(value)) for name, value in differences)
    return Paired(unit, n, mean, interval, p_t, p_wilcoxon, effect, rank, smallest, wins, losses, shown)


def _caveats(
    categories: Paired, seeds: Paired, records_a: Sequence[StoredRecord], records_b: Sequence[StoredRecord]
) -> list[str]:
    notes = [
        f"{categories.n} categories x {seeds.n} seeds are not {categories.n * seeds.n} independent observations: the "
        f"category test has n = {categories.n} (seeds averaged first), the seed test n = {seeds.n}.",
        "The category test asks whether the difference would hold on other categories of this kind; the seed test "
        "whether it would hold in more trainings on these categories.",
    ]
    for result, units in ((categories, "categories"), (seeds, "seeds")):
        if result.n < 2:
            notes.append(f"One {result.unit} allows no test over {units}.")
        elif result.smallest > 0.05:
            least = f"p below {result.smallest:.3g}, whatever the data"
            notes.append(f"With n = {result.n} the Wilcoxon test over {units} cannot give {least}.")
    notes += _differences(records_a, records_b)
    made = [" or ".join(sorted({versions(stored) for stored in records})) for records in (records_a, records_b)]
    if made[0] != made[1]:
        notes.append(f"A was run with {made[0]}, B with {made[1]}.")
    if any(s.record.random_weights for s in (*records_a, *records_b)):
        notes.append("RANDOM BACKBONE WEIGHTS: this does not show how good the methods are.")
    return notes


def _differences(records_a: Sequence[StoredRecord], records_b: Sequence[StoredRecord], limit: int = 8) -> list[str]:
    """What A and B differ in: method, backbone and images in a reader's words, then options, each with both values."""

    def both(values: Sequence[Iterable[str]]) -> list[str]:
        return [" or ".join(sorted(set(side))) for side in values]

    sides = (records_a, records_b)
    found = [("method", *both([[s.record.method for s in side] for side in sides]))]
    for axis in METHOD_AXES:
        found.append((axis, *both([[axis_value(s, axis) for s in side] for side in sides])))
    told = [f"{name}: A {a}, B {b}" for name, a, b in found if a != b]
    lines = [f"A and B differ in {'; '.join(told)}."] if told else []
    options = []
    configs = [[options_of(stored) for stored in side] for side in sides]
    names = [set().union(*side) for side in configs]
    one_method = found[0][1] == found[0][2]  # what another method has no option for is not a difference of options
    for key in sorted(names[0] | names[1] if one_method else names[0] & names[1]):
        if key.startswith(_SAID):
            continue
        a, b = both([[show_value(config[key]) if key in config else "not set" for config in side] for side in configs])
        if a != b:
            options.append(f"{key}: A {a}, B {b}")
    if options:
        more = f"; and {len(options) - limit} more" if len(options) > limit else ""
        lines.append(f"Options in which A and B differ: {'; '.join(options[:limit])}{more}.")
    return lines


def _split_conditions(text: str) -> list[str]:
    """Split at commas outside of brackets, so that a list may be a value."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


_HEADS = (
    "paired over", "n", "A − B", "95 % interval", "p (t)", "p (Wilcoxon)", "d_z", "rank-biserial", "A better / worse",
)  # fmt: skip


def show(result: Comparison, console: Console) -> None:
    """Print the comparison for a reader at a terminal; where nine columns have no room, with a column per unit."""
    title, sentence, rows, categories = _parts(result)
    console.print(f"[bold]{escape(title)}[/]", highlight=False)
    console.print(escape(sentence), highlight=False)
    lines = [_HEADS, *rows]
    if console.width < 108:
        lines = list(zip(*lines, strict=True))
    grid = Table(header_style="bold")
    for number, head in enumerate(lines[0]):
        grid.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in lines[1:]:
        grid.add_row(*map(escape, row))
    console.print(grid, soft_wrap=True)
    console.print(escape(categories), highlight=False)
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)


def report(result: Comparison) -> str:
    """The comparison as Markdown."""
    title, sentence, rows, categories = _parts(result)
    lines = [f"**{title}**", "", sentence, "", *markdown_frame(_HEADS, rows, 1), "", categories, ""]
    return "\n".join(lines + [f"- {note}" for note in result.notes]) + "\n"


def _parts(result: Comparison) -> tuple[str, str, list[list[str]], str]:
    """Title, the sentence with both means, the rows of `_HEADS`, and the differences per category."""
    title = f"{metric_label(result.metric)} on {result.dataset}: A = {result.a}, B = {result.b}"
    sentence = (
        f"A {result.mean_a:.2f}, B {result.mean_b:.2f}, A − B = {result.over_seeds.difference:+.2f} points "
        f"({len(result.categories)} categories, seeds {', '.join(map(str, result.seeds))})."
    )
    rows = []
    for r in (result.over_categories, result.over_seeds):
        interval = "–" if r.interval is None else f"{r.interval[0]:+.2f} … {r.interval[1]:+.2f}"
        cells = [_p(r.p_t), _p(r.p_wilcoxon), _number(r.effect), _number(r.rank)]
        name = "categories" if r.unit == "category" else "seeds"
        rows.append([name, str(r.n), f"{r.difference:+.2f}", interval, *cells, f"{r.wins} / {r.losses}"])
    ordered = sorted(result.over_categories.differences, key=lambda pair: pair[1])
    return title, sentence, rows, "Per category: " + ", ".join(f"{name} {value:+.2f}" for name, value in ordered) + "."


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
