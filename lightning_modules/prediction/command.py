"""`python -m lightning_modules predict`: what a finished run says of new photographs, in files for people and programs.

    predict --run=mine --images /photos            # a run's name or its record's folder; a folder of images
    predict --run=mine --images a.jpg b.jpg --out=/place --category=cookie --alpha=0.01

Every photograph gets a decision (good, defect or cannot tell, with the reason), a score, a p-value, and the regions of its map
above the pixel threshold, in `scores.csv` and, as COCO annotations, in `predictions.json`; pictures at its own size; and
its place on `predictions.html`, the worst first. Everything else is an option of Lightning's `predict`.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shlex
from collections.abc import Iterable, Sequence

import lightning as L

from datamodules.problems import number_of
from lightning_modules.callbacks.predictions import Predictions
from lightning_modules.decisions import Decider
from lightning_modules.prediction import place
from lightning_modules.running import recorded_configuration, recording
from lightning_modules.running.command_line import UniReconCLI
from lightning_modules.running.filling import with_environment
from lightning_modules.running.finding import find_run
from lightning_modules.running.loading import part_of

SHOWN = 20
"""At most this many photographs that could not be read are named on the terminal."""


class PredictCLI(UniReconCLI):
    """Lightning's `predict` with the run's decisions."""

    def __init__(self, args: list[str], options: argparse.Namespace) -> None:
        self.options = options
        super().__init__(args)

    def _callbacks(self) -> list[L.Callback]:
        given, run, data = self.options, self.run_config, self.datamodule
        images = [data.predict_root] if isinstance(data.predict_root, str) else data.predict_root
        source = place.Source.of(run.record, images)
        folder = place.choose(run.work / "predictions", given.out, source)
        decider = Decider.of(run.record, run.rule, run.alpha, given.category or "")
        if decider is not None and decider.given and getattr(self.model, "predicted_class", "") is None:
            self.model.predicted_class = decider.given  # HVQ-Trans switches by it
        scale = recording.colour_scale(run.record)
        self.predictions = Predictions(folder, source, decider, scale)
        return [*super()._callbacks(), self.predictions]

    def after_predict(self) -> None:
        if failed := self.predictions.failed:
            shown = [f"  {line}" for line in failed[:SHOWN]]
            shown += [f"  and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
            have = "has" if len(failed) == 1 else "have"
            what = f"{number_of(len(failed), 'image')} could not be read and {have} no score (reasons in scores.csv):"
            raise SystemExit("\n".join([f"error: {what}", *shown, "Everything else is written."]))


def main(arguments: Sequence[str], methods: Iterable[type]) -> None:
    """Parses the command's own options; everything else is an option of Lightning's `predict`."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules predict",
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--run", help="name (mine, or sweep/name) or record folder of a finished run")
    parser.add_argument("--images", nargs="+", help="folders (searched recursively), files, or patterns like '*.jpg'")
    parser.add_argument("--out", help="folder for the files (default: predictions, beside the run's checkpoint)")
    parser.add_argument(
        "--category", help="what all photographs show (default: by their folder, else by what they resemble)"
    )
    parser.add_argument("--alpha", type=float, help="wanted rate of false alarms, for example 0.01")
    parser.add_argument("--rule", help="of the threshold (default: the run's own; with --alpha, conformal)")
    options, more = parser.parse_known_args(list(arguments))
    if {"-h", "--help"} & set(more):
        parser.print_help()
        print("\nOptions of Lightning's predict:\n")
    words = ["predict"]
    if options.run is not None:
        record = find_run(options.run)
        if options.category:
            record = part_of(record, options.category)
        words.append(f"--config={record / 'config.yaml'}")
    if options.images:
        words += ["--data.init_args.predict_root", json.dumps(images_of(options.images))]
    if options.alpha is not None or options.rule is not None:  # together they stand for the run's own two
        more += [f"--run.alpha={_or_null(options.alpha)}", f"--run.rule={_or_null(options.rule)}"]
    PredictCLI(with_environment(recorded_configuration.as_data([*words, *more], methods), os.environ), options)


def _or_null(value: float | str | None) -> float | str:
    return "null" if value is None else value


def images_of(words: Sequence[str]) -> list[str]:
    """Folders and files that are meant by words: each one itself, a pattern, or several, quoted as for a shell.

    Raises:
        FileNotFoundError: names what is not there.
    """
    found: list[str] = []
    for word in words:
        if not word.strip():
            raise FileNotFoundError("No image is named: give IMAGES=<folder, file or several>.")
        try:
            several = [word] if os.path.lexists(os.path.expanduser(word)) else shlex.split(word)
        except ValueError:  # a quote that is never closed
            several = [word]
        for one in several:
            path = os.path.expanduser(one)
            matching = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
            if not matching:
                raise FileNotFoundError(f"{one} is not there: IMAGES is a folder of images, an image file, or several.")
            found += matching
    return found
