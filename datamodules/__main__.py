"""Command line: `python -m datamodules synthetic OUT` and `python -m datamodules check --dataset NAME --data-root PATH`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

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
    return parser


def _synthetic(options: argparse.Namespace, console: Console) -> int:
    from datamodules.synthetic import Plan, generate

    names = tuple(part.strip() for part in options.categories.split(",")) if options.categories else None
    plan = Plan(options.seed, options.size, options.train, options.test, options.defects, names, options.layout)
    start = time.perf_counter()
    root = generate(options.out, plan)
    console.print(f"{len(plan.names)} categories in {root} ({time.perf_counter() - start:.1f} s)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 the data has errors, 2 the command cannot be done."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        return {"synthetic": _synthetic}[options.command](options, console)
    except DataError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", markup=True, highlight=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
