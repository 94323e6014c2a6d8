"""`python -m lightning_modules.metrics FOLDER`: score saved anomaly maps against masks and print the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console

from . import folder
from .rendering import main_metrics, render


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Score saved anomaly maps against masks, exactly.",
        epilog=folder.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="FOLDER", help="folder of maps, or a CSV file that names them")
    parser.add_argument("--masks", type=Path, help="folder of the masks, if not FOLDER (MVTec layout)")
    parser.add_argument("--metrics", help="names separated by commas (default: all)")
    parser.add_argument("--fpr-limits", default="0.3", help="limits of AUPRO, separated by commas (default: 0.3)")
    parser.add_argument("--connectivity", type=int, default=8, choices=(4, 8), help="of the regions of AUPRO")
    parser.add_argument("--no-pooled", action="store_true", help="leave out the pooled ranking of all categories")
    parser.add_argument("--max-megapixels", type=float, default=folder.MAX_MEGAPIXELS, help="larger files are refused")
    parser.add_argument("--on-disk", type=Path, metavar="DIRECTORY", help="keep the maps in temporary files there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every number, in long form")
    parser.add_argument("--definitions", action="store_true", help="print what each number means")
    args = parser.parse_args(arguments)
    Image.MAX_IMAGE_PIXELS = None  # --max-megapixels is the one limit
    try:
        metrics = folder.score_maps(
            folder.find_maps(args.path, args.masks),
            args.max_megapixels,
            metrics=args.metrics.split(",") if args.metrics else None,
            fpr_limits=[float(limit) for limit in args.fpr_limits.split(",")],
            connectivity=args.connectivity,
            pooled=not args.no_pooled,
            maps_directory=args.on_disk,
        )
        result = metrics.compute()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for damaged files
        print(f"error: {error}", file=sys.stderr)
        return 2
    caption = f"percent; metric definitions version {result.version}"
    table = render(result.table, main_metrics(result.table), caption=caption)
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)  # a cut number is worse than a long line
    console.print(table)
    reasons = result.table[result.table.reason != ""]
    for (scope, category, reason), part in reasons.groupby(["scope", "category", "reason"], sort=False):
        console.print(f"{category or scope}: {', '.join(dict.fromkeys(part.metric))}: {reason}", style="yellow")
    if args.definitions:
        for name, text in result.definitions.items():
            console.print(f"[bold]{name}[/bold]: {text}")
    if args.csv:
        try:
            result.table.to_csv(args.csv, index=False, errors="surrogateescape")
        except OSError as error:
            print(f"error: {args.csv} cannot be written: {error.strerror or error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
