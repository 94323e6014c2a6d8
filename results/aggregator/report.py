"""The report: one self-contained HTML page, one's own runs first, then every table, figure and where each number is from."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from results.aggregator import audit, figures, methods_table, names, render
from results.aggregator.build import category_tables, paper_table, sweep_table
from results.aggregator.curves import curve_table
from results.aggregator.own_runs import Picture, Shown, overview, own, show
from results.aggregator.records import RecordError, RecordSet, StoredRecord
from results.aggregator.scores import ConflictError, kinds
from results.aggregator.spec import Spec, SpecError, find_spec, spec_for_sweep, spec_names
from results.aggregator.sweep_cells import SweepCells, describe_cell, read_sweep
from results.aggregator.table import Table

_CONFIGS = 300  # beyond so many records their configurations stay in the records
_PICTURES = 12_000_000  # bytes of heat maps in one page


@dataclass
class _Block:
    """A table with its pictures, or why it was refused; with the table of the methods what belongs beside it."""

    table: Table | None = None
    figures: Sequence[Picture] = ()
    per_category: Sequence[Table] | None = None
    title: str = ""
    refused: str = ""
    beside: Table | None = None
    said: str = ""


@dataclass
class _Pictures:
    """Hands out the heat maps of runs until the page is large enough, and remembers which it kept back."""

    left: int = _PICTURES
    kept_back: list[str] = field(default_factory=list)

    def of(self, stored: StoredRecord) -> list[Picture]:
        """A run's heat maps, a picture per category and then its failures."""
        pictures, skipped = [], 0
        for file, rows in stored.heatmaps.groupby("file", sort=False):
            try:
                data = stored.picture(file)
            except RecordError as error:
                pictures.append(Picture("Left out", str(error)))
                continue
            if not data or len(data) > self.left:
                skipped += 1
                continue
            self.left -= len(data)
            title = f"{names.dataset_label(rows['dataset'].iloc[0])} / {rows['category'].iloc[0]}"
            text = ", ".join(f"{row.rank}: {row.defect} ({float(row.image_score):.4g})" for row in rows.itertuples())
            kind = "png" if file.endswith(".png") else "jpeg"
            pictures.append(Picture(title, text, _uri(kind, data), _width(data)))
        if skipped:
            self.kept_back.append(f"{stored.name}: {skipped} pictures, in {stored.path / 'heatmaps'}")
        return pictures


def _width(picture: bytes) -> int:
    """Width in pixels, 0 if it is no picture."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.width
    except OSError:
        return 0


def write_report(
    path: str | Path,
    records: RecordSet | Sequence[StoredRecord],
    sweeps: str | Path = "sweeps",
    pictures: str | Path = "results/figures",
) -> Path:
    """Write the page and return its path; the page needs no other file, no server and no network.

    pictures: The folder where `make gallery` left methods side by side, if it did.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records, Path(sweeps), Path(pictures)), encoding="utf-8")
    return path


def page(records: RecordSet | Sequence[StoredRecord], sweeps: Path, pictures: Path | None = None) -> str:
    """The page as HTML text."""
    shown: dict[str, StoredRecord] = {}
    records, damaged = list(records), getattr(records, "damaged", ())
    budget = _Pictures()
    runs, of_sweeps = own(records)
    blocks = _sweeps(records, sweeps, shown)
    first = [_run(stored, budget, shown) for stored in runs]
    gallery, elsewhere = _gallery(records, budget, shown)
    text = render.template().page(
        lead=_lead(records),
        damaged=damaged,
        runs=first,
        overview=overview(runs) if len(runs) > 1 else None,
        of_sweeps=of_sweeps,
        ablations=[block for kind, block in blocks if kind != "methods"],
        methods=[block for kind, block in blocks if kind == "methods"],
        papers=_papers(records, shown),
        audit=audit.audit_table(audit.audit()),
        side_by_side=_side_by_side(pictures, records, shown),
        gallery=gallery,
        elsewhere=elsewhere,
        kept_back=budget.kept_back,
        definitions=_definitions(shown),
        records=_records(shown),
    )
    return str(text)


def _lead(records: Sequence[StoredRecord]) -> str:
    """How many records there are, of whom, and of when."""
    mine = [stored for stored in records if not stored.reference]
    newest = max((str(s.record.provenance.get("started") or "") for s in mine), default="")
    own_text = f"{len(mine)} runs of your own" + (
        f", the newest started {newest[:16].replace('T', ' ')}" if newest else ""
    )
    return f"{own_text}; {len(records) - len(mine)} reference records, which come with the project"


def _run(stored: StoredRecord, budget: _Pictures, shown: dict[str, StoredRecord]) -> Shown:
    """A run of one's own with its curve and its heat maps."""
    found = show(stored)
    shown[stored.name] = stored
    try:
        figure = figures.run_figure(stored)
    except RecordError as error:
        found.remarks.append(f"No curves: {error}")
        figure = None
    if figure is not None:
        found.curve = Picture("Curves", "Training by epoch.", _source(figure))
    found.pictures = budget.of(stored)
    return found


def _sweeps(records: Sequence[StoredRecord], folder: Path, shown: dict[str, StoredRecord]) -> list[tuple[str, _Block]]:
    """The tables of the sweeps with their kind of spec, those with runs of one's own first."""
    blocks = []
    controls = [stored for stored in records if stored.record.sweep in names.CONTROLS]
    mine = {stored.record.sweep for stored in records if stored.record.cell and not stored.reference}
    for name in sorted(
        {stored.record.sweep for stored in records if stored.record.cell}, key=lambda n: (n not in mine, n)
    ):
        file = folder / f"{name}.yaml"
        sweep = read_sweep(file) if file.is_file() else None
        spec = spec_for_sweep(name)
        for kind, part in kinds([stored for stored in records if stored.record.sweep == name], compared=True):
            block = _guarded(name, kind, partial(_ablation, spec, part, sweep, kind, shown, controls))
            if block is not None:
                blocks.append((spec.kind, block))
    return blocks


def _guarded(name: str, kind: str, make: Callable[[], _Block | None]) -> _Block | None:
    """A block, or in its place why it was refused."""
    try:
        return make()
    except (ConflictError, SpecError, ValueError) as error:
        return _Block(title=f"{name} ({kind})" if kind else name, refused=str(error))


def _ablation(
    spec: Spec,
    records: Sequence[StoredRecord],
    sweep: SweepCells | None,
    kind: str,
    shown: dict[str, StoredRecord],
    controls: Sequence[StoredRecord] = (),
) -> _Block:
    per_category = beside = None
    said = ""
    if spec.kind == "curves":
        table = curve_table(spec, records, sweep)
        drawn = [
            (
                figures.curves_figure(spec, records, sweep),
                "Thin lines: seeds; thick: their mean. Each panel has its own axes.",
            )
        ]
    else:
        table = sweep_table(spec, records, sweep, controls=controls)
        drawn = [(figures.sweep_figure(spec, table, records), "Mean over categories; each dot is a seed.")]
        metric = methods_table.quality(table)
        for price in methods_table.PRICES if spec.kind == "methods" else ("parameters", "seconds_per_epoch"):
            figure = figures.cost_against_quality(table, records, metric, price)
            if figure is not None:
                drawn.append((figure, "Cost against quality."))
        per_category = [_named(each, kind) for each in category_tables(spec, records, sweep)]
    if spec.kind == "methods":
        found = methods_table.ranks(records)
        said = found.silent or methods_table.sentence(found)
        if not found.silent:
            drawn.append((figures.critical_difference(found), "Average ranks; a bar joins methods that do not differ."))
        beside = methods_table.control_table(spec, records, sweep)
        if beside is not None:
            _use(beside, records, shown)
        else:
            said += f" No control was run ({', '.join(methods_table.CONTROLS)}), so nothing is compared with one."
    _use(table, [*records, *controls], shown)
    pictures = [Picture("", text, _source(figure)) for figure, text in drawn]
    return _Block(_named(table, kind), pictures, per_category, beside=beside and _named(beside, kind), said=said)


def _source(figure: Figure) -> str:
    """The figure as a picture of its own, so that the ids inside two of them cannot clash."""
    return _uri("svg+xml", figures.svg(figure).encode())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _named(table: Table, kind: str) -> Table:
    """The table with its kind in name and title, so that two profiles' tables can stand on one page."""
    if kind:
        table.name, table.title = f"{table.name}.{kind}", f"{table.title} ({kind.replace('.', ', ')})"
    return table


def _papers(
    records: Sequence[StoredRecord], shown: dict[str, StoredRecord]
) -> dict[str, list[tuple[str, bool, list[_Block]]]]:
    """For each paper its tables: title, whether our runs stand in it, and the blocks."""
    papers: dict[str, list] = {}
    for name in spec_names():
        spec, paper = find_spec(name), name.rpartition("_")[0]
        if spec.rows is None or "source" not in spec.where or name != f"{paper}_{spec.where['table']}":
            continue
        beside = [
            _guarded(name, kind, lambda s=spec, m=mine, k=kind: _beside(s, m, k, shown))  # type: ignore[misc]
            for kind, mine in (kinds(records) if records else [])
        ]
        beside = [block for block in beside if block]
        blocks = beside or [_Block(paper_table(spec, "published"))]
        papers.setdefault(names.method_label(paper), []).append((spec.title, bool(beside), blocks))
    return papers


def _beside(spec: Spec, records: Sequence[StoredRecord], kind: str, shown: dict[str, StoredRecord]) -> _Block | None:
    """The paper's table with our runs beside it, or None if no run fits any of its places."""
    table = paper_table(spec, "both", records)
    if not table.has_runs:
        return None
    _use(table, records, shown)
    metrics = dict.fromkeys(column.metric for column in table.columns if column.ranked)
    drawn = [figure for metric in metrics if (figure := figures.against_published(table, metric)) is not None]
    return _Block(_named(table, kind), [Picture("", "Ours against the printed numbers.", _source(f)) for f in drawn])


def _use(table: Table, records: Sequence[StoredRecord], shown: dict[str, StoredRecord]) -> None:
    used = {name for line in table.cells for cell in line if cell.runs for name in cell.runs.records}
    shown.update({stored.name: stored for stored in records if stored.name in used})


def _gallery(
    records: Sequence[StoredRecord], budget: _Pictures, shown: dict[str, StoredRecord]
) -> tuple[list[tuple[str, StoredRecord, list[Picture]]], list[str]]:
    """Heat maps of sweeps and reference records: from one run per method, data set and kind, the newest, one's own first.

    One's own trainings outside of sweeps have theirs in the first section. Beside them, where the others' heat maps are.
    """
    with_pictures = [stored for stored in records if stored.record.cell and len(stored.heatmaps)]
    chosen: dict[tuple, StoredRecord] = {}
    for stored in sorted(with_pictures, key=lambda s: (not s.reference, str(s.record.provenance.get("started") or ""))):
        record = stored.record
        chosen[(record.method, record.profile, record.protocol, tuple(d["name"] for d in record.datasets))] = stored
    gallery = []
    for stored in sorted(chosen.values(), key=lambda s: s.reference):
        shown[stored.name] = stored
        title = f"{names.method_label(stored.record.method)}, {stored.record.profile} profile"
        gallery.append((f"{title}, {describe_cell(stored.record.cell)}", stored, budget.of(stored)))
    drawn = {stored.name for stored in chosen.values()}
    others = [f"{s.name}: {s.path / 'heatmaps'}" for s in with_pictures if s.name not in drawn]
    return gallery, others


def _side_by_side(
    folder: Path | None, records: Sequence[StoredRecord], shown: dict[str, StoredRecord]
) -> tuple[str, str] | None:
    """The picture of `make gallery` (data URI) and its caption; None if there is none of the records on this page."""
    if folder is None or not (folder / "gallery.json").is_file() or not (folder / "gallery.png").is_file():
        return None
    content = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
    by_name = {stored.name: stored for stored in records}
    if not set(content["runs"]) <= set(by_name):
        return None
    shown.update({name: by_name[name] for name in content["runs"]})
    return _uri("png", (folder / "gallery.png").read_bytes()), str(content["caption"])


def _definitions(shown: dict[str, StoredRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What each metric means, as the runs recorded it, per version of the metrics."""
    versions: dict[str, dict[str, str]] = {}
    for stored in shown.values():
        found = stored.record.metrics
        versions.setdefault(str(found["version"]), {}).update(found.get("definitions") or {})
    return [
        (version, [(names.metric_label(name), text) for name, text in definitions.items()])
        for version, definitions in sorted(versions.items())
    ]


def _records(shown: dict[str, StoredRecord]) -> list[tuple[str, dict[str, object], str | None]]:
    """The provenance of every run that the page shows: its name, the facts and the configuration's text."""
    records = []
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
            "Kind": "reference record, comes with the project" if stored.reference else "a run of one's own",
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
        records.append((name, facts, stored.config_text if len(shown) <= _CONFIGS else None))
    return records
