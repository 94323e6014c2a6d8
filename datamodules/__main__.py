"""Command line: `python -m datamodules check`, `... fetch`, `... synthetic OUT` and `... cache`; `--help` explains each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from datamodules.errors import DataError
from datamodules.problems import number_of
from results.common import trouble
from results.common.environment import NamedDataset, parse, parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datamodules", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    synthetic = commands.add_parser("synthetic", help="write the embedded benchmark into a folder")
    synthetic.add_argument("out", help="folder to write into; a complete one of the same options is left as it is")
    synthetic.add_argument("--seed", type=int, default=0)
    synthetic.add_argument("--size", type=int, default=224, help="side of the square images in pixels")
    synthetic.add_argument("--train", type=int, default=40, help="normal training images per category")
    synthetic.add_argument("--test", type=int, default=8, help="normal test images per category")
    synthetic.add_argument("--defects", type=int, default=3, help="test images per kind of defect")
    synthetic.add_argument("--categories", help="names separated by commas, default all")
    synthetic.add_argument("--layout", choices=("mvtec", "mvtec_loco"), default="mvtec")
    synthetic.add_argument("--sheet", help="also write a contact sheet to this .jpg file")
    check = commands.add_parser(
        "check",
        help="count a dataset's images and list everything that is wrong with it",
        epilog="Without --dataset the environment names the data: DATASET, DATA_ROOT and CATEGORIES.",
    )
    check.add_argument(
        "--dataset",
        help="name of a reader, for example mvtec_ad, real_iad or folder",
    )
    check.add_argument("--data-root", help="folder of the dataset; not needed for photos")
    check.add_argument("--categories", help="names separated by commas, default all")
    check.add_argument("--image-size", type=int, help="side at which defects are looked for, default 64, 128 and 256")
    check.add_argument(
        "--crop-from", type=int, help="count what lies in the margin of a crop from this side to --image-size"
    )
    check.add_argument("--max-megapixels", type=float, default=179.0, help="larger image files are errors")
    check.add_argument(
        "--out", help="folder to write contact sheets into, with index.html; without it none are written"
    )
    check.add_argument("--per-kind", type=int, default=8, help="images of each kind on a contact sheet")
    check.add_argument("--seed", type=int, default=0, help="of the choice of these images")
    fetch = commands.add_parser(
        "fetch",
        help="download a public dataset, check it and unpack it",
        epilog="Without --dataset the environment names the data: DATASET and DATA_ROOT.",
    )
    fetch.add_argument("--dataset", help="mvtec_ad, mvtec_loco, mvtec_ad_2, visa or btad")
    fetch.add_argument("--data-root", help="folder for this dataset alone")
    fetch.add_argument("--accept", action="store_true", help="accept the licence, which is shown, without being asked")
    fetch.add_argument(
        "--address", default="", help="another address of the same archive; its checksum must be the same"
    )
    cache = commands.add_parser("cache", help="list the entries of the feature cache, or delete some")
    cache.add_argument("--root", default="results/cache", help="folder of the cache")
    cache.add_argument("--clear", nargs="+", metavar="KEY", help="delete these entries; `all` deletes everything")
    return parser


def _cache(options: argparse.Namespace, console: Console) -> int:
    from rich.table import Table

    from datamodules.cache.folder import age, entries, remove
    from results.common.did_you_mean import did_you_mean

    found = entries(Path(options.root))
    if options.clear:
        chosen = [entry for entry in found if entry.key in options.clear or "all" in options.clear]
        unknown = set(options.clear) - {"all", *(entry.key for entry in found)}
        if unknown:
            name = sorted(unknown)[0]
            raise DataError(f"{options.root} has no entry {name!r}. {did_you_mean(name, [e.key for e in found])}")
        for entry in chosen:
            done = "deleted" if remove(entry) else "in use by a process, left as it is"
            console.print(f"{entry.key}: {done} ({entry.nbytes / 2**20:.0f} MiB)")
        return 0
    shown = Table(title=f"{options.root}: {sum(entry.nbytes for entry in found) / 2**30:.2f} GiB")
    shown.add_column("key", no_wrap=True)  # in one piece it can be copied to CLEAR=
    for column in ("data", "holds", "MiB", "last used"):
        shown.add_column(column, justify="right" if column == "MiB" else "left", overflow="fold")
    for entry in reversed(found):
        shown.add_row(
            entry.key, escape(entry.data), escape(entry.title), f"{entry.nbytes / 2**20:.0f}", age(entry.used)
        )
    console.print(shown)
    return 0


def _synthetic(options: argparse.Namespace, console: Console) -> int:
    from datamodules.synthetic import Plan, contact_sheet, generate

    names = parts(options.categories) or None
    plan = Plan(options.seed, options.size, options.train, options.test, options.defects, names, options.layout)
    start = time.perf_counter()
    root = generate(options.out, plan)
    console.print(f"{number_of(len(plan.names), 'category')} in {root} ({time.perf_counter() - start:.1f} s)")
    if options.sheet:
        console.print(f"contact sheet in {contact_sheet(options.sheet, options.seed)}")
    return 0


def _chosen(options: argparse.Namespace, categories: tuple[str, ...] | None = None) -> Sequence[NamedDataset]:
    """The datasets of the options, or those of the environment."""
    from datamodules.readers import has_own_root

    if options.dataset:
        return (NamedDataset(options.dataset, options.data_root or "", categories),)
    try:
        chosen = parse(os.environ, has_own_root).datasets
    except ValueError as error:
        raise DataError(str(error)) from error
    if not chosen:
        raise DataError("No dataset is named: set DATASET and DATA_ROOT, or --dataset and --data-root.")
    return chosen


def _fetch(options: argparse.Namespace, console: Console) -> int:
    from datamodules.download.fetch import fetch
    from datamodules.download.sources import source_of

    chosen = [(source_of(dataset.name), dataset.root) for dataset in _chosen(options)]
    if options.address and len(chosen) > 1:
        raise DataError("An address is that of one archive: name one dataset with it.")
    for source, root in chosen:
        if not root:
            raise DataError(f"{source.name}: name a folder for it: DATA_ROOT, or --data-root.")
        fetch(source, root, options.accept, console, options.address)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from datamodules.check import SIZES, check, show

    chosen = _chosen(options, parts(options.categories) or None)
    if options.crop_from and not options.image_size:
        raise DataError("--crop-from needs --image-size, the side of the centre that is kept.")
    crop = (options.crop_from, options.image_size) if options.crop_from else None
    sizes, reports = (options.image_size,) if options.image_size else SIZES, []
    for dataset in chosen:
        report = check(dataset.name, dataset.root, dataset.categories, console, sizes, options.max_megapixels, crop)
        show(report, console)
        reports.append(report)
    if options.out:
        from datamodules.contact_sheet import write_sheets

        page = write_sheets(reports, options.out, options.per_kind, options.seed, options.max_megapixels)
        console.print(f"contact sheets, masks outlined: {escape(str(page))}", highlight=False, soft_wrap=True)
    return 1 if any(report.errors for report in reports) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 the data has errors, 2 the command cannot be done."""
    return trouble.told(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        commands = {"check": _check, "fetch": _fetch, "synthetic": _synthetic, "cache": _cache}
        return commands[options.command](options, console)
    except DataError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
