"""`python -m results`: tables, figures and the report from run records; the papers' tables and their audit."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from results.aggregator import audit as auditing
from results.aggregator import documents, methods_table, names, reference, render
from results.aggregator.build import SOURCES, category_tables, paper_table, sweep_table
from results.aggregator.curves import curve_table
from results.aggregator.records import DamagedRecordWarning, RecordError, RecordSet, StoredRecord, read_records
from results.aggregator.scores import ConflictError, data_of, distinct, experiment_of, kinds, newest, select
from results.aggregator.spec import Spec, SpecError, find_spec, spec_for_sweep, spec_names
from results.aggregator.sweep_cells import SweepCells, read_sweep
from results.aggregator.sweep_rows import varies
from results.aggregator.table import Table
from results.common import trouble
from results.common.did_you_mean import did_you_mean
from results.common.methods import SWEEP
from results.common.shown import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = Path("results/tables")
console = Console()
errors = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 if all went well; 1 if it was done without a damaged record, which is named and left out, or, with --strict, if
    anything is missing; 2 if it could not be done, or a table among many was refused.
    """
    return trouble.told(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    options.damaged = False
    try:
        return options.command(options) or int(options.damaged)
    except (ConflictError, SpecError, RecordError, FileNotFoundError, ValueError) as error:
        _complain("error:", error)
        return 2


def _sweep(options: argparse.Namespace) -> int:
    """A sweep's table on the terminal and as files, and its per-category tables; one table for each kind of run."""
    sweep = load_sweep(options.name, options.sweeps)
    spec = spec_for_sweep(_there(options))
    records = _records(options, options.name)
    if not records:
        raise ValueError(f"no record of sweep {options.name} is left to show{_filters(options)}")
    missing = [
        _sweep_table(spec, part, sweep, options, f".{kind}" if kind else "")
        for kind, part in kinds(records, compared=True)
    ]
    return int(options.strict and any(missing))


def _sweep_table(
    spec: Spec, records: Sequence[StoredRecord], sweep: SweepCells | None, options: argparse.Namespace, suffix: str
) -> bool:
    """Shows and writes one table of a sweep; whether anything is missing in it."""
    table = build_sweep(spec, records, sweep, options.std == "rms", _controls(options))
    _show(table, options, suffix)
    if spec.kind == "curves":
        from results.aggregator import figures

        if options.format is None:
            path = figures.save(figures.curves_figure(spec, records, sweep), options.out / f"{table.name}{suffix}.png")
            _say(f"figure: {path}")
        return bool(table.missing)
    if spec.kind == "methods":
        _methods(spec, records, table, options)
    details = category_tables(spec, records, sweep, options.std == "rms")
    if options.categories:
        for detail in details:
            _print(detail, options.format)
    if options.format is None:
        path = options.out / f"{table.name}{suffix}.categories.md"
        path.write_text("\n".join(render.markdown(detail) for detail in details), encoding="utf-8")
        for form in ("csv", "latex"):
            text = "\n".join(render.render(detail, form) for detail in details)
            path.with_suffix("." + render.SUFFIXES[form]).write_text(text, encoding="utf-8")
        _say(f"per category: {path}")
    return bool(table.missing)


def _table(options: argparse.Namespace) -> int:
    """One of the papers' tables, or a sweep's own: by a sweep's name that too, unless --source asks for the paper's."""
    options.name = options.id
    spec = spec_for_sweep(_there(options))
    named = options.id != spec.name  # by its sweep
    printed = (
        not named and spec.rows is not None and spec.kind != "curves" and (not spec.sweep or "source" in spec.where)
    )
    if not printed or (spec.sweep == options.id and options.source is None):
        if options.source == "published":
            paper = f": that is TABLE={spec.name}" if named and spec.paper else ""
            raise ValueError(f"no paper prints the table {options.id}{paper}; leave --source (SOURCE=) out")
        also = " --source both (SOURCE=both) shows the paper's table of that name." if printed else ""
        if options.dataset:
            raise ValueError(
                f"{options.id} shows every data set that its sweep ran on: leave --dataset (DATASET=) out.{also}"
            )
        options.name = spec.sweep or spec.name
        options.categories = False
        try:
            return _sweep(options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{also}") from None
    source = options.source or "both"
    if options.dataset and source == "published":
        raise ValueError("--dataset is of runs; with --source published there are none: leave one of them out")
    records: Sequence[StoredRecord] = _records(options) if source != "published" else ()
    if options.dataset:
        records = _on(options.dataset, records)
    table = paper_table(spec, source, records, rms_std=options.std == "rms", dataset=options.dataset)
    _show(table, options, f".{source}" + (f".{options.dataset}" if options.dataset else ""))
    return int(options.strict and bool(table.missing))


def _on(dataset: str, records: Sequence[StoredRecord]) -> list[StoredRecord]:
    """Of the records those that a paper's table takes, of this data set; every record if there are none, for the message."""
    taken = [stored for stored in records if stored.record.sweep == SWEEP or not stored.cell]
    return [s for s in taken if any(d["name"] == dataset for d in s.record.datasets)] or list(records)


def _tables(options: argparse.Namespace) -> int:
    """Rebuild everything under results/tables/."""
    records = _records(options)
    written, refused = [], []
    for build, suffix in _everything(records, options):
        try:
            table = build()
        except (ConflictError, SpecError, ValueError) as error:
            refused.append(str(error))
            continue
        if table.source == "published" or table.has_runs:
            written += _write(table, options.out, suffix)
    written += _write(auditing.audit_table(auditing.audit()), options.out, "")
    main_file = options.out / "tables.tex"
    main_file.write_text(render.latex_document([p.name for p in written if p.suffix == ".tex"]), encoding="utf-8")
    _say(f"{len(written)} files in {options.out}; all LaTeX tables in one document: {main_file}")
    for problem in refused:
        _complain("refused:", problem)
    return 2 if refused else 0


def _everything(records: Sequence[StoredRecord], options: argparse.Namespace):
    """(how to build it, suffix of its files) for every table that can be built."""
    controls = [stored for stored in records if stored.record.sweep in names.CONTROLS]
    for sweep in sorted({stored.record.sweep for stored in records if stored.record.cell}):
        for kind, mine in kinds([stored for stored in records if stored.record.sweep == sweep], compared=True):
            yield (
                lambda s=sweep, m=mine: build_sweep(
                    spec_for_sweep(s), m, load_sweep(s, options.sweeps), False, controls
                ),
                f".{kind}" if kind else "",
            )
    for name in spec_names():
        spec = find_spec(name)
        if spec.rows is None or spec.kind == "curves" or "source" not in spec.where:
            continue
        yield lambda s=spec: paper_table(s, "published"), ".published"
        for kind, mine in kinds(records):
            suffix = f".both.{kind}" if kind else ".both"
            yield lambda s=spec, m=mine: paper_table(s, "both", m), suffix


def _audit(options: argparse.Namespace) -> int:
    """Recompute every printed mean and gap."""
    table = auditing.audit_table(auditing.audit())
    _show(table, options)
    return int(options.strict and bool(table.rows))


def _compare(options: argparse.Namespace) -> int:
    """Paired tests between two methods, runs or cells."""
    from results.aggregator import compare as comparing

    records: Sequence[StoredRecord] = _records(options)
    if options.dataset:
        known = sorted({d["name"] for stored in records for d in stored.record.datasets})
        records = [s for s in records if any(d["name"] == options.dataset for d in s.record.datasets)]
        if not records:
            raise ValueError(f"no run is of the data set {options.dataset!r}; runs are of {', '.join(known) or 'none'}")
    a, b = comparing.choose(records, options.a), comparing.choose(records, options.b)
    for metric in options.metric or ["image_auroc", "pixel_auroc"]:
        result = comparing.compare(a, b, options.a, options.b, metric, options.dataset, options.variant)
        if sys.stdout.isatty():
            comparing.show(result, console)
        else:
            print(comparing.report(result))
    return 0


def _figures(options: argparse.Namespace) -> int:
    """Figures of a sweep, for each kind of run apart, or of a paper's table with our runs beside the printed numbers."""
    from results.aggregator import figures

    drawn: dict[str, Figure | None] = {}
    paper = find_spec(options.name) if options.name in spec_names() else None
    if paper is not None and paper.rows is not None and "source" in paper.where and paper.sweep is None:
        table = paper_table(paper, "both", _records(options))
        for metric in dict.fromkeys(column.metric for column in table.columns if column.ranked):
            drawn[f"{options.name}.{metric}"] = figures.against_published(table, metric)
    else:
        spec = paper or spec_for_sweep(_there(options))
        sweep, records = load_sweep(spec.sweep or spec.name, options.sweeps), _records(options, spec.sweep)
        if spec.kind == "curves":
            drawn[options.name] = figures.curves_figure(spec, records, sweep)
        for kind, part in kinds(records, compared=True) if spec.kind != "curves" else ():
            table = build_sweep(spec, part, sweep, False)
            name = options.name + table.name.removeprefix(spec.name) + (f".{kind}" if kind else "")
            drawn[name] = figures.sweep_figure(spec, table, part)
            metric = methods_table.quality(table)
            for price in methods_table.PRICES if spec.kind == "methods" else ("parameters", "seconds_per_epoch"):
                drawn[f"{name}.{price}"] = figures.cost_against_quality(table, part, metric, price)
    wanted = {name: figure for name, figure in drawn.items() if figure is not None}
    paths = [figures.save(figure, options.out / f"{name}.{options.suffix}") for name, figure in wanted.items()]
    if not paths:
        raise ValueError(f"nothing to draw for {options.name}: no run stands beside a printed number")
    for path in paths:
        _say(f"figure: {path}")
    return 0


def _methods(spec: Spec, records: Sequence[StoredRecord], table: Table, options: argparse.Namespace) -> None:
    """What the table of the sweep `methods` is accompanied by: each method against the control, costs, ranks."""
    from results.aggregator import figures

    beside = methods_table.control_table(spec, records, load_sweep(spec.sweep or spec.name, options.sweeps))
    if beside is not None:
        _show(beside, options)
    else:
        _complain("note:", f"no control was run ({', '.join(methods_table.CONTROLS)}), so nothing is compared with one")
    found = methods_table.ranks(records)
    if options.format is not None:
        return
    _say(found.silent or methods_table.sentence(found))
    drawn: dict[str, Figure | None] = {} if found.silent else {"ranks": figures.critical_difference(found)}
    for price in methods_table.PRICES:
        drawn[price] = figures.cost_against_quality(table, records, methods_table.quality(table), price)
    for name, figure in drawn.items():
        if figure is not None:
            _say(f"figure: {figures.save(figure, options.out / f'{table.name}.{name}.png')}")


def _report(options: argparse.Namespace) -> int:
    """One self-contained HTML page of everything."""
    from results.aggregator.report import write_report

    records = _records(options)
    out = options.out if options.out.suffix == ".html" else options.out / "report.html"
    path = write_report(out, records, options.sweeps, options.root.parent / "figures")
    _say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _documents(options: argparse.Namespace) -> int:
    """Fill the tables of documents whose rows name a cell, `<!-- sweep: key=value -->`, from the reference records."""
    different = False
    for path in options.files or documents.DOCUMENTS:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        filled = documents.filled(text, str(path))
        changed = [pair for pair in zip(text.splitlines(), filled.splitlines(), strict=True) if pair[0] != pair[1]]
        for old, new in changed if options.check else ():
            _say(f"{path}\n  has     {old}\n  records {new}")
        if changed and not options.check:
            path.write_bytes(filled.encode())
        _say(f"{path}: {len(changed)} rows {'differ' if options.check else 'changed'}")
        different |= bool(changed)
    return int(options.check and different)


def _list(options: argparse.Namespace) -> int:
    """Names of the tables."""
    for name in spec_names():
        spec = find_spec(name)
        _say(f"{name:24} {spec.title}")
    return 0


def build_sweep(
    spec: Spec,
    records: Sequence[StoredRecord],
    sweep: SweepCells | None,
    rms_std: bool = False,
    controls: Sequence[StoredRecord] = (),
) -> Table:
    """The table of a sweep, whatever its kind."""
    if spec.kind == "curves":
        return curve_table(spec, records, sweep)
    return sweep_table(spec, records, sweep, rms_std=rms_std, controls=controls)


def load_sweep(name: str, folder: Path) -> SweepCells | None:
    """The sweep file of that name, None if there is none (then the rows are the cells that were run)."""
    path = folder / f"{name}.yaml"
    return read_sweep(path) if path.is_file() else None


def _there(options: argparse.Namespace) -> str:
    """The name that was asked for; ValueError if no table, sweep file or folder of records has it."""
    places = (options.root, options.reference or options.root.parent / reference.FOLDER.name)
    known = {*spec_names(), *(path.stem for path in options.sweeps.glob("*.yaml"))}
    known |= {path.name for place in places for path in place.glob("*") if path.is_dir()}
    if options.name not in known:
        raise ValueError(
            f"there is no sweep or table {options.name!r}. {did_you_mean(options.name, sorted(known))} `make sweeps` and "
            "`python -m results list` name them."
        )
    return options.name


def _records(options: argparse.Namespace, sweep: str | None = None) -> RecordSet:
    """One's own records and, for cells without any, the reference records, as the options choose them."""
    folder = options.reference or options.root.parent / reference.FOLDER.name
    coming = reference.read_reference(folder, sweep)
    found = RecordSet(())
    if (options.root if sweep is None else options.root / sweep).is_dir() or not coming:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedRecordWarning)
            found = _own(options, sweep)
    names = [f"{damaged.path.parent.name}/{damaged.path.name}" for damaged in (*found.damaged, *coming.damaged)]
    options.damaged = any(not options.runs or fnmatchcase(n, p) for n in names for p in options.runs or ("",))
    for damaged in (*found.damaged, *coming.damaged):
        _complain("damaged record, left out:", damaged)
    if unchecked := [stored.name for stored in found if stored.unchecked]:
        more = f" and {len(unchecked) - 3} more" if len(unchecked) > 3 else ""
        _complain("note:", f"attachments without checksums (an older version's): {', '.join(unchecked[:3])}{more}")
    kind = options.profile, options.protocol
    experiment = options.compare or None, options.setting or None
    chosen = select(found, *kind, options.runs or (), *experiment)
    chosen = newest(chosen) if options.newest else distinct(chosen)
    beside = select(coming, *kind, (), *experiment)
    if sweep is None:
        beside = [stored for stored in beside if stored.record.sweep != reference.SMALL]
    if sweep is not None and chosen:  # a table of the data and the experiment that were run
        ran = {(data_of(stored), experiment_of(stored)) for stored in chosen}
        beside = [stored for stored in beside if (data_of(stored), experiment_of(stored)) in ran]
    together = reference.complete(
        chosen, beside, lambda name: varies(spec_for_sweep(name), load_sweep(name, options.sweeps))
    )
    return RecordSet(tuple(sorted(together, key=lambda stored: stored.name)), found.damaged)


def _own(options: argparse.Namespace, sweep: str | None) -> RecordSet:
    """One's own records; without any folder of records only where one sweep's are asked for is that an error."""
    if sweep is None and not options.root.is_dir():
        return RecordSet(())
    return read_records(options.root, sweep)


def _controls(options: argparse.Namespace) -> list[StoredRecord]:
    """The records that stand as controls beside the tables of other sweeps."""
    own = argparse.Namespace(**{**vars(options), "runs": None})
    folders = (options.root, options.reference or options.root.parent / reference.FOLDER.name)
    there = [name for name in names.CONTROLS if any((folder / name).is_dir() for folder in folders)]
    return [stored for name in there for stored in _records(own, name)]


def _say(text: str) -> None:
    """A line for the user; names in it are not read as markup."""
    console.print(escape(printable(text)), highlight=False, soft_wrap=True)


def _complain(label: str, what: object) -> None:
    errors.print(f"[bold red]{label}[/] {escape(printable(str(what)))}", highlight=False, soft_wrap=True)


def _filters(options: argparse.Namespace) -> str:
    given = {name: getattr(options, name) for name in ("profile", "protocol", "compare", "setting", "runs")}
    text = ", ".join(f"--{name} {value}" for name, value in given.items() if value)
    return f" (after {text})" if text else ""


def _print(table: Table, form: str | None) -> None:
    if form in (None, "terminal"):
        render.print_table(table, console if console.is_terminal else Console(width=120))
    else:
        print(render.render(table, form), end="")


def _show(table: Table, options: argparse.Namespace, suffix: str = "") -> None:
    """Print in the wanted format; without one, print for a reader and write Markdown, CSV and LaTeX."""
    _print(table, options.format)
    if options.format is None:
        for path in _write(table, options.out, suffix):
            _say(f"written: {path}")


def _write(table: Table, out: Path, suffix: str) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for form in ("markdown", "csv", "latex"):
        path = out / f"{table.name}{suffix}.{render.SUFFIXES[form]}"
        path.write_text(render.render(table, form), encoding="utf-8")
        paths.append(path)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m results", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    records = argparse.ArgumentParser(add_help=False)
    records.add_argument("--root", type=Path, default=Path("results/runs"), help="folder of the run records")
    records.add_argument(
        "--reference", type=Path, help="folder of the reference records (default: reference, beside that of the runs)"
    )
    records.add_argument("--sweeps", type=Path, default=Path("sweeps"), help="folder of the sweep files")
    records.add_argument("--profile", help="only runs of this profile (demo, paper)")
    records.add_argument("--protocol", help="only runs of this protocol (clean, as_released)")
    records.add_argument("--setting", help="only runs of this setting (unified, per_category)")
    records.add_argument("--compare", help="of the sweep methods only this experiment (recipe, matched, longer)")
    records.add_argument(
        "--runs", action="append", metavar="PATTERN", help="only runs whose sweep/run fits; may be repeated"
    )
    records.add_argument(
        "--newest",
        action="store_true",
        help="where different code ran one cell and seed more than once, only the last run",
    )
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--out", type=Path, default=OUT, help="folder for the files")
    output.add_argument("--format", choices=render.FORMATS, help="print this format and write nothing")
    output.add_argument("--strict", action="store_true", help="exit with 1 if anything is missing")
    output.add_argument(
        "--std", choices=("seeds", "rms"), default="seeds",
        help="spread of a mean row: over seeds of the mean, or root mean square of the categories' (as ULSAD prints)",
    )  # fmt: skip

    def add(name: str, command, parents, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=parents, help=text, description=command.__doc__)
        sub.set_defaults(command=command)
        return sub

    sub = add("sweep", _sweep, [records, output], "the table of a sweep")
    sub.add_argument("name")
    sub.add_argument("--categories", action="store_true", help="also print the per-category table of each cell")
    sub = add("table", _table, [records, output], "one table of a paper, as printed, from our runs, or side by side")
    sub.add_argument("id", help="a sweep, or see `python -m results list`")
    sub.add_argument("--source", choices=SOURCES, help="which numbers (default: both; of a sweep, its own table)")
    sub.add_argument("--dataset", metavar="NAME", help="the same table on this data set instead of the paper's")
    add("tables", _tables, [records, output], "rebuild everything under results/tables/")
    add("audit", _audit, [output], "check the papers' printed tables against themselves")
    sub = add("compare", _compare, [records], "paired tests between two methods, runs or cells")
    sub.add_argument("a", help="method, sweep/run*, or sweep:key=value,key=value")
    sub.add_argument("b")
    sub.add_argument("--metric", action="append")
    sub.add_argument("--dataset")
    sub.add_argument("--variant", default="")
    sub = add("figures", _figures, [records], "figures of a sweep or a paper's table")
    sub.add_argument("name")
    sub.add_argument("--out", type=Path, default=OUT)
    sub.add_argument("--suffix", choices=("png", "svg", "pdf"), default="png")
    sub = add("report", _report, [records], "one self-contained HTML page")
    sub.add_argument("--out", type=Path, default=Path("results/report.html"))
    sub = add("documents", _documents, [], "the numbers of README.md and results/DEMOS.md")
    sub.add_argument("files", nargs="*", type=Path)
    sub.add_argument("--check", action="store_true", help="write nothing; name the rows that differ, and exit with 1")
    add("list", _list, [], "names of the papers' tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
