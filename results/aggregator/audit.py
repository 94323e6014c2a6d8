"""Check the printed tables against themselves: every mean row, every gap, and numbers that two tables share.

A mean of numbers rounded to one unit may differ from the printed mean by at most that unit (half of it from the
members, half from the mean). Within it the two agree up to rounding; beyond it the paper disagrees with itself.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from results.aggregator import names
from results.aggregator.published import Printed, read_published
from results.aggregator.spec import find_spec, spec_names
from results.aggregator.table import Cell, Column, Row, Table, Value

_SEVEN = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
_SHORT = 4
#: (summary table, the table whose mean row it repeats) per source and metric.
_REPEATS = {
    "ulsad_paper": {
        ("1", "image_auroc"): {"mvtec_ad": "6", "mvtec_loco": "9", "mpdd": "12", "btad": "15", "visa": "18"},
        ("2", "pixel_auroc"): {"mvtec_ad": "7", "mvtec_loco": "10", "mpdd": "13", "btad": "16", "visa": "19"},
        ("2", "pixel_aupro"): {"mvtec_ad": "8", "mvtec_loco": "11", "mpdd": "14", "btad": "17", "visa": "20"},
    }
}


@dataclass(frozen=True)
class Finding:
    """One check of a printed number. `kind` is mean, row, gap, repeat, copy or summary; numbers are percent.

    `verdict`: exact, rounding (within one unit of the last printed digit), or disagrees.
    """

    kind: str
    source: str
    table: str
    what: str
    printed: float
    recomputed: float
    verdict: str

    @property
    def difference(self) -> float:
        """Printed minus recomputed."""
        return self.printed - self.recomputed


def audit(published: Mapping[tuple[str, ...], Printed] | None = None) -> list[Finding]:
    """Every check of every published table, in the order of the files."""
    numbers = read_published() if published is None else published
    rows, explained = _copied_rows(numbers)
    return [*rows, *_means(numbers, explained), *_gaps(numbers), *_repeats(numbers), *_summaries(numbers)]


def disagreements(findings: list[Finding]) -> list[Finding]:
    """The findings where a paper disagrees with itself."""
    return [finding for finding in findings if finding.verdict == "disagrees"]


def _verdict(printed: float, recomputed: float, unit: float) -> str:
    difference = abs(printed - recomputed)
    if difference <= unit / 2 + 1e-9:
        return "exact"
    return "rounding" if difference <= unit + 1e-9 else "disagrees"


def _column(key: tuple[str, ...]) -> tuple[str, ...]:
    """What decides in how many digits a number is printed: its table, data set, method, variant and metric."""
    source, table, dataset, _, method, variant, metric = key
    return source, table, dataset, method, variant, metric.removesuffix("_gap")


def _units(numbers: Mapping[tuple[str, ...], Printed]) -> dict[tuple[str, ...], float]:
    """Key of a number -> one unit of the last digit that its column prints.

    The files do not keep zeros at the end, so a column's digits are the most that any of its numbers has, and those of the
    whole table where the column is too short (`_SHORT`) for that to tell.
    """
    columns: dict[tuple[str, ...], list[float]] = defaultdict(list)
    tables: dict[tuple[str, ...], float] = defaultdict(lambda: 1.0)
    for key, number in numbers.items():
        text = f"{number.value:.6f}".rstrip("0")
        unit = 10.0 ** -len(text.partition(".")[2])
        columns[_column(key)].append(unit)
        tables[key[:2]] = min(tables[key[:2]], unit)
    return {key: min(found) if len(found := columns[_column(key)]) >= _SHORT else tables[key[:2]] for key in numbers}


def _copied_rows(numbers: Mapping[tuple[str, ...], Printed]) -> tuple[list[Finding], set[tuple[str, ...]]]:
    """Member rows that equal the mean row in all their columns, while that is not the mean: the row is the copy.

    Looked at before the means, because a slip of the pen in one row is likelier than one in every column of the mean. What the
    row should say is solved for from the printed mean and the other members.

    Returns:
        The findings, and the means (source, table, dataset, method, variant, metric) that are explained by them.
    """
    groups: dict[tuple[str, ...], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for (source, table, dataset, category, method, variant, metric), number in numbers.items():
        groups[source, table, dataset, method, variant][category][metric] = number.value
    findings: list[Finding] = []
    explained: set[tuple[str, ...]] = set()
    for (source, table, dataset, method, variant), rows in groups.items():
        mean = rows.get("mean", {})
        members = [category for category in rows if not category.startswith("mean")]
        for category in members:
            if len(mean) < 2 or len(members) < 2 or rows[category] != mean:
                continue
            solved = {
                metric: value * len(members) - sum(rows[other][metric] for other in members if other != category)
                for metric, value in mean.items()
                if all(metric in rows[other] for other in members)
            }
            if all(math.isclose(solved[metric], mean[metric], abs_tol=0.05) for metric in solved):
                continue  # the row is as good as the mean by chance
            for metric, value in solved.items():
                what = f"{_what(dataset, category, method, variant, metric)}: SUSPECT ROW, equals the mean row in all columns"
                findings.append(Finding("row", source, table, what, mean[metric], value, "disagrees"))
                explained.add((source, table, dataset, method, variant, metric))
    return findings, explained


def _means(numbers: Mapping[tuple[str, ...], Printed], explained: Collection[tuple[str, ...]] = ()) -> list[Finding]:
    members: dict[tuple, dict[str, Printed]] = defaultdict(dict)
    for (source, table, dataset, category, method, variant, metric), number in numbers.items():
        members[source, table, dataset, method, variant, metric][category] = number
    units, findings = _units(numbers), []
    for (source, table, dataset, method, variant, metric), found in members.items():
        single = {category: number for category, number in found.items() if not category.startswith("mean")}
        if not single:
            continue
        for category in ("mean", "mean_objects", "mean_textures"):
            if category not in found or (
                category == "mean" and (source, table, dataset, method, variant, metric) in explained
            ):
                continue
            part = names.PARTIAL_MEANS.get((dataset, category), tuple(single))
            values = [single[name].value for name in part if name in single]
            what = _what(dataset, "" if category == "mean" else category, method, variant, metric)
            recomputed = statistics.fmean(values)
            verdict = _verdict(
                found[category].value, recomputed, units[source, table, dataset, category, method, variant, metric]
            )
            findings.append(Finding("mean", source, table, what, found[category].value, recomputed, verdict))
    return findings


def _gaps(numbers: Mapping[tuple[str, ...], Printed]) -> list[Finding]:
    """The gaps to the default row; the default is the row of the table's spec that is marked so."""
    defaults = {}
    for name in spec_names():
        spec = find_spec(name)
        for row in spec.rows or ():
            if row.default and "variant" in row.where:
                defaults[spec.where.get("source"), spec.where.get("table")] = row.where["variant"]
    units, findings = _units(numbers), []
    for key, gap in numbers.items():
        *head, variant, metric = key
        if not metric.endswith("_gap"):
            continue
        plain = metric.removesuffix("_gap")
        default = numbers[(*head, defaults[key[0], key[1]], plain)].value
        recomputed = default - numbers[(*head, variant, plain)].value
        what = _what(head[2], "", head[4], variant, plain)
        verdict = _verdict(gap.value, recomputed, units[key])
        findings.append(Finding("gap", key[0], key[1], what, gap.value, recomputed, verdict))
    return findings


def _repeats(numbers: Mapping[tuple[str, ...], Printed]) -> list[Finding]:
    """Numbers of a summary table against the mean rows of the tables that it summarises.

    An entry that contradicts its own mean row and equals the same method's entry for another data set is a copy. Equal
    entries alone may be chance, and one pair is: both re-derive.
    """
    findings = []
    for source, summaries in _REPEATS.items():
        for (table, metric), targets in summaries.items():
            column = {k[2:]: n.value for k, n in numbers.items() if (k[0], k[1], k[6]) == (source, table, metric)}
            for (dataset, *rest), value in column.items():
                own = numbers[(source, targets[dataset], dataset, *rest)].value
                twins = [
                    other for (other, *same), v in column.items() if same == rest and other != dataset and v == value
                ]
                what = f"{_what(dataset, '', rest[1], '', metric)} against the mean row of Table {targets[dataset]}"
                if math.isclose(value, own):
                    findings.append(Finding("repeat", source, table, what, value, own, "exact"))
                elif twins:
                    what += f"; equals its own {names.dataset_label(twins[0])} entry"
                    findings.append(Finding("copy", source, table, what, value, own, "disagrees"))
                else:
                    findings.append(Finding("repeat", source, table, what, value, own, "disagrees"))
    return findings


def _summaries(numbers: Mapping[tuple[str, ...], Printed]) -> list[Finding]:
    """The mean of seven metrics that a benchmark prints as mAD."""
    findings = []
    for key, number in numbers.items():
        if key[-1] != "mean_of_seven":
            continue
        seven = [numbers[(*key[:-1], metric)].value for metric in _SEVEN if (*key[:-1], metric) in numbers]
        if len(seven) == len(_SEVEN):
            verdict = _verdict(number.value, statistics.fmean(seven), 0.1)
            what = _what(key[2], "", key[4], key[5], key[6])
            findings.append(Finding("summary", key[0], key[1], what, number.value, statistics.fmean(seven), verdict))
    return findings


def _what(dataset: str, category: str, method: str, variant: str, metric: str) -> str:
    parts = [
        names.dataset_label(dataset),
        names.category_label(category) if category else "",
        names.method_label(method),
    ]
    parts += [variant, names.metric_label(metric)]
    return " · ".join(part for part in parts if part)


def counts(findings: list[Finding]) -> dict[str, dict[str, int]]:
    """kind -> verdict -> number of checks."""
    result: dict[str, dict[str, int]] = {}
    for finding in findings:
        verdicts = result.setdefault(finding.kind, {"exact": 0, "rounding": 0, "disagrees": 0})
        verdicts[finding.verdict] += 1
    return result


def audit_table(findings: list[Finding]) -> Table:
    """The disagreements as a table, largest first within each source."""
    found = disagreements(findings)
    columns = [Column("printed", metric="threshold", digits=2), Column("recomputed", metric="threshold", digits=2)]
    columns.append(Column("difference", metric="threshold", digits=2))
    rows, cells = [], []
    previous = ""
    for finding in sorted(found, key=lambda f: (f.source, f.kind, -abs(f.difference))):
        rows.append(Row((finding.source, finding.table, finding.kind, finding.what), rule=finding.source != previous))
        previous = finding.source
        numbers = (finding.printed, finding.recomputed, finding.difference)
        cells.append([Cell(published=Value(number, printed=True)) for number in numbers])
    total = len(findings)
    summary = "; ".join(
        f"{kind}: {v['exact']} exact, {v['rounding']} within rounding, {v['disagrees']} disagree"
        for kind, v in counts(findings).items()
    )
    caption = f"{total} checks of printed numbers. {summary}."
    headers = ("Source", "Table", "Check", "Number")
    return Table(
        "audit",
        "Where the papers' tables disagree with themselves",
        "published",
        headers,
        rows,
        columns,
        cells,
        caption,
    )
