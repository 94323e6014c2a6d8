"""The report: one self-contained HTML page with every table, figure, heat map and the provenance of every number."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from results.aggregator import audit, figures, names, render
from results.aggregator.build import category_tables, paper_table, sweep_table
from results.aggregator.curves import curve_table
from results.aggregator.records import RecordError, RecordSet, StoredRecord
from results.aggregator.render import record_id
from results.aggregator.scores import ConflictError, kinds
from results.aggregator.spec import Spec, SpecError, find_spec, spec_for_sweep, spec_names
from results.aggregator.sweep_file import SweepFile, describe_cell, read_sweep
from results.aggregator.table import Table

_HERE = Path(__file__).parent
_CONFIGS = 300  # beyond so many records their configurations stay in the records
_PICTURES = 12_000_000  # bytes of heat maps in one page

_READING = """
<p>Numbers are percent, the mean over categories and then over seeds; ± is the sample standard deviation over seeds of
that mean. <strong>Bold</strong> is best, <u>underlined</u> second best, ★ the default row, brackets the distance to it.
A dash is a number that does not exist: no table averages over fewer categories, and below it is listed what is missing.
Point at a number to see what it is, click on it for the runs behind it. Click on the head of a column to sort.</p>
<dl>
<dt><strong>Protocol clean</strong></dt>
<dd>The default: full test set, last epoch, thresholds only from held-out normal images, no flipped AUROC, exact
metrics.</dd>
<dt><strong>Protocol as_released</strong></dt>
<dd>What a method's released code does, test-set model selection included, to compare with a printed number.</dd>
<dt><strong>Unified, per category</strong></dt>
<dd>One model for all categories of a data set, or one model each.</dd>
</dl>
<p>Runs of different protocols, profiles, backbones, image sizes, metric versions or data never stand in one table;
where the records would make it so, the page shows the refusal instead.</p>
"""


def write_report(path: str | Path, records: RecordSet | Sequence[StoredRecord], sweeps: str | Path = "sweeps") -> Path:
    """Write the page and return its path; the page needs no other file, no server and no network."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records, Path(sweeps)), encoding="utf-8")
    return path


def page(records: RecordSet | Sequence[StoredRecord], sweeps: Path) -> str:
    """The page as HTML text."""
    shown: dict[str, StoredRecord] = {}
    ablations = _ablations(list(records), sweeps, shown)
    papers = _papers(list(records), shown)
    audited = render.html_text(audit.audit_table(audit.audit()))
    gallery = _gallery(list(records), shown)
    damaged = getattr(records, "damaged", ())
    newest = max((str(s.record.provenance.get("started") or "") for s in records), default="")
    lead = f"{len(records)} run records" + (f", the newest started {newest}" if newest else "")
    warnings = "".join(f'<p class="shout">Damaged record, left out: {html.escape(str(item))}</p>' for item in damaged)
    sections = [
        ("reading", "How to read this page", _READING),
        (
            "ablations",
            "Ablations",
            ablations or "<p>No sweep has left a record yet: run <code>make sweep ABLATION=...</code></p>",
        ),
        ("papers", "The papers' tables", papers),
        ("audit", "Audit of the printed numbers", audited),
        ("gallery", "Heat maps", gallery),
        ("definitions", "Metric definitions", _definitions(shown)),
        ("records", "Records", _records(shown)),
    ]
    links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title, _ in sections)
    body = "".join(f'<h2 id="{anchor}">{html.escape(title)}</h2>{content}' for anchor, title, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>UniRecon results</title><style>{(_HERE / "report.css").read_text(encoding="utf-8")}</style></head>
<body><header><h1>UniRecon results</h1><p class="lead">{html.escape(lead)}</p>{warnings}<nav>{links}</nav></header>
<main>{body}</main>
<aside id="origin" hidden><button type="button">Close</button><strong></strong><p>From these runs:</p><ul></ul></aside>
<footer>Written by <code>python -m results report</code> from results/runs and results/published.</footer>
<script>{(_HERE / "report.js").read_text(encoding="utf-8")}</script></body></html>
"""


def _ablations(records: Sequence[StoredRecord], folder: Path, shown: dict[str, StoredRecord]) -> str:
    parts = []
    for name in sorted({stored.record.sweep for stored in records if stored.record.cell}):
        file = folder / f"{name}.yaml"
        sweep = read_sweep(file) if file.is_file() else None
        spec = spec_for_sweep(name)
        for kind, mine in kinds([stored for stored in records if stored.record.sweep == name]):
            parts.append(_guarded(name, kind, lambda s=spec, m=mine, w=sweep, k=kind: _ablation(s, m, w, k, shown)))
    return "".join(parts)


def _guarded(name: str, kind: str, make: Callable[[], str]) -> str:
    """A section, or in its place why it was refused."""
    try:
        return make()
    except (ConflictError, SpecError, ValueError) as error:
        title = f"{name} ({kind})" if kind else name
        return f'<h3>{html.escape(title)}: refused</h3><div class="refused">{html.escape(str(error))}</div>'


def _ablation(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepFile | None, kind: str, shown: dict[str, StoredRecord]
) -> str:
    if spec.kind == "curves":
        table = curve_table(spec, records, sweep)
        drawn = [(figures.curves_figure(spec, records, sweep), "Thin lines: seeds; thick: their mean.")]
        details = ""
    else:
        table = sweep_table(spec, records, sweep)
        drawn = [(figures.ablation_bars(table, records), "Mean over categories; each dot is a seed.")]
        metric = next((column.metric for column in table.columns if column.ranked), "")
        for price in ("parameters", "seconds_per_epoch"):
            figure = figures.cost_against_quality(table, records, metric, price)
            if figure is not None:
                drawn.append((figure, "Cost against quality."))
        each = "".join(render.html_text(_named(t, kind)) for t in category_tables(spec, records, sweep))
        details = f"<details><summary>Per category, for each cell</summary>{each}</details>"
    _use(table, records, shown)
    pictures = "".join(_figure(figure, text) for figure, text in drawn)
    return render.html_text(_named(table, kind)) + pictures + details


def _figure(figure: Figure, text: str) -> str:
    """The figure as a picture of its own, so that the ids inside two of them cannot clash."""
    source = base64.b64encode(figures.svg(figure).encode()).decode()
    alt = html.escape(text, quote=True)
    picture = f'<img class="figure" alt="{alt}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure>{picture}<figcaption>{html.escape(text)}</figcaption></figure>"


def _named(table: Table, kind: str) -> Table:
    """The table with its kind in name and title, so that two profiles' tables can stand on one page."""
    if kind:
        table.name, table.title = f"{table.name}.{kind}", f"{table.title} ({kind.replace('.', ', ')})"
    return table


def _papers(records: Sequence[StoredRecord], shown: dict[str, StoredRecord]) -> str:
    parts, paper = [], None
    for name in spec_names():
        spec = find_spec(name)
        if (
            spec.rows is None
            or "source" not in spec.where
            or name != f"{name.rpartition('_')[0]}_{spec.where['table']}"
        ):
            continue
        if name.rpartition("_")[0] != paper:
            paper = name.rpartition("_")[0]
            parts.append(f"<h3>{html.escape(names.method_label(paper))}</h3>")
        beside = ""
        for kind, mine in kinds(records) if records else []:
            beside += _guarded(name, kind, lambda s=spec, m=mine, k=kind: _beside(s, m, k, shown))
        content = beside or render.html_text(paper_table(spec, "published"))
        opened = " open" if beside else ""
        parts.append(f"<details{opened}><summary>{html.escape(spec.title)}</summary>{content}</details>")
    return "".join(parts)


def _beside(spec: Spec, records: Sequence[StoredRecord], kind: str, shown: dict[str, StoredRecord]) -> str:
    """The paper's table with our runs beside it, or nothing if no run fits any of its places."""
    table = paper_table(spec, "both", records)
    if not table.has_runs:
        return ""
    _use(table, records, shown)
    pictures = ""
    for metric in dict.fromkeys(column.metric for column in table.columns if column.ranked):
        figure = figures.against_published(table, metric)
        if figure is not None:
            pictures += _figure(figure, "Ours against the printed numbers.")
    return render.html_text(_named(table, kind)) + pictures


def _use(table: Table, records: Sequence[StoredRecord], shown: dict[str, StoredRecord]) -> None:
    used = {name for line in table.cells for cell in line if cell.runs for name in cell.runs.records}
    shown.update({stored.name: stored for stored in records if stored.name in used})


def _gallery(records: Sequence[StoredRecord], shown: dict[str, StoredRecord]) -> str:
    """Worst, median and best image of every category, from one run per method, data set and kind: the newest."""
    chosen: dict[tuple, StoredRecord] = {}
    for stored in sorted(records, key=lambda s: str(s.record.provenance.get("started") or "")):
        if len(stored.heatmaps):
            record = stored.record
            single = not record.cell  # a training of its own before a cell of an ablation
            key = (record.method, record.profile, record.protocol, tuple(d["name"] for d in record.datasets))
            if key not in chosen or single or chosen[key].record.cell:
                chosen[key] = stored
    parts, left, skipped = [], _PICTURES, 0
    for stored in chosen.values():
        shown[stored.name] = stored
        cell = f", {describe_cell(stored.record.cell)}" if stored.record.cell else ""
        title = f"{names.method_label(stored.record.method)}, {stored.record.profile} profile{cell}"
        link = f'<a href="#{record_id(stored.name)}">{html.escape(stored.name)}</a>'
        shout = '<p class="shout">RANDOM BACKBONE WEIGHTS</p>' if stored.record.random_weights else ""
        parts.append(f"<h3>{html.escape(title)}</h3>{shout}<p class='caption'>Run {link}</p><div class='gallery'>")
        for file, rows in stored.heatmaps.groupby("file", sort=False):
            try:
                data = stored.picture(file)
            except RecordError as error:
                parts.append(f'<p class="shout">Left out: {html.escape(str(error))}</p>')
                continue
            if not data or len(data) > left:
                skipped += 1
                continue
            left -= len(data)
            kind = "png" if file.endswith(".png") else "jpeg"
            category = f"{names.dataset_label(rows['dataset'].iloc[0])} / {rows['category'].iloc[0]}"
            ranks = ", ".join(f"{row.rank}: {row.defect} ({float(row.image_score):.3g})" for row in rows.itertuples())
            source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            parts.append(
                f'<figure><img loading="lazy" alt="{html.escape(category, quote=True)}" src="{source}">'
                f"<figcaption><strong>{html.escape(category)}</strong> {html.escape(ranks)}</figcaption></figure>"
            )
        parts.append("</div>")
    if not chosen:
        return "<p>No record holds heat maps.</p>"
    rule = (
        "Chosen by rule among the anomalous test images of each category: lowest (worst), median and highest (best) "
        "image score, which stands in brackets. One colour scale per category."
    )
    note = (
        f"<p class='missing'>{skipped} pictures are left out to keep the page small; they are in the records.</p>"
        if skipped
        else ""
    )
    return f"<p>{rule}</p>{note}" + "".join(parts)


def _definitions(shown: dict[str, StoredRecord]) -> str:
    """What each metric means, as the runs recorded it, per version of the metrics."""
    versions: dict[str, dict[str, str]] = {}
    for stored in shown.values():
        found = stored.record.metrics
        versions.setdefault(str(found["version"]), {}).update(found.get("definitions") or {})
    parts = []
    for version, definitions in sorted(versions.items()):
        lines = "".join(
            f"<dt><strong>{html.escape(names.metric_label(name))}</strong></dt><dd>{html.escape(str(text))}</dd>"
            for name, text in definitions.items()
        )
        parts.append(f"<h3>Version {html.escape(version)}</h3><dl>{lines}</dl>")
    return "".join(parts) or "<p>No record on this page states its metrics.</p>"


def _records(shown: dict[str, StoredRecord]) -> str:
    """The provenance of every run that the page shows, one folded block each."""
    parts = [f"<p>Runs behind the numbers of this page: {len(shown)}.</p>"]
    for name, stored in sorted(shown.items()):
        record, came = stored.record, stored.record.provenance
        datasets = "; ".join(
            f"{d['name']}: {', '.join(map(str, d['categories']))} (fingerprint {d['fingerprint']})"
            for d in record.datasets
        )
        versions = ", ".join(f"{package} {version}" for package, version in (came.get("versions") or {}).items())
        commit = str(came.get("git_commit") or "unknown") + (
            " with uncommitted changes" if came.get("git_dirty") else ""
        )
        facts = {
            "Method": names.method_label(record.method),
            "Cell": describe_cell(record.cell) if record.cell else "a training of its own",
            "Seed": record.seed,
            "Protocol, profile": f"{record.protocol}, {record.profile}, {record.setting}",
            "Images": f"{record.image_size[0]} x {record.image_size[1]}, {record.resize}",
            "Backbone": ", ".join(
                f"{key} {value}" for key, value in record.backbone.items() if value not in (None, "")
            ),
            "Data": datasets,
            "Metrics version": record.metrics["version"],
            "Parameters": ", ".join(f"{key} {value:,}" for key, value in record.parameters.items()),
            "Commit": commit,
            "Command": came.get("command"),
            "Started": came.get("started"),
            "Took": f"{came.get('wall_seconds', '?')} s, {came.get('epochs', '?')} epochs",
            "Device": came.get("device"),
            "Versions": versions,
            "Notes": "; ".join(record.notes),
        }
        lines = "".join(
            f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>"
            for key, value in facts.items()
            if value not in (None, "")
        )
        config = ""
        if len(shown) <= _CONFIGS:
            config = f"<details><summary>Configuration</summary><pre>{html.escape(stored.config_text)}</pre></details>"
        summary = f"<summary>{html.escape(name)}</summary>"
        parts.append(f'<details class="record" id="{record_id(name)}">{summary}<dl>{lines}</dl>{config}</details>')
    return "".join(parts)
