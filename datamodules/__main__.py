"""Command line: `python -m datamodules check --dataset NAME --data-root PATH` and `... synthetic OUT`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from datamodules.errors import DataError


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
    check = commands.add_parser("check", help="count a dataset's images and list everything that is wrong with it")
    check.add_argument("--dataset", required=True, help="mvtec_ad, mvtec_loco, btad, mpdd, visa, folder or synthetic")
    check.add_argument("--data-root", required=True, help="folder of the dataset")
    check.add_argument("--categories", help="names separated by commas, default all")
    return parser


def _synthetic(options: argparse.Namespace, console: Console) -> int:
    from datamodules.synthetic import Plan, contact_sheet, generate

    names = _names(options.categories)
    plan = Plan(options.seed, options.size, options.train, options.test, options.defects, names, options.layout)
    start = time.perf_counter()
    root = generate(options.out, plan)
    console.print(f"{len(plan.names)} categories in {root} ({time.perf_counter() - start:.1f} s)")
    if options.sheet:
        console.print(f"contact sheet in {contact_sheet(options.sheet, options.seed)}")
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from datamodules.check import check, show

    report = check(options.dataset, options.data_root, _names(options.categories), console)
    show(report, console)
    return 1 if report.errors else 0


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names of a list separated by commas; None for an empty one."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip()) or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 the data has errors, 2 the command cannot be done."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        return {"check": _check, "synthetic": _synthetic}[options.command](options, console)
    except DataError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
