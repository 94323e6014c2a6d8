"""`python -m lightning_modules.exporting`: a finished run as one file that other programs run without this project.

The graph takes resized photographs, uint8 (batch, height, width, RGB), and gives anomaly maps and image scores in float32.
Its metadata say how to resize, and which score is a defect. The file is read back and must give the run's own maps and
scores on its test images before it gets its name.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from datamodules.errors import DataError
from lightning_modules.exporting import metadata
from lightning_modules.exporting.agreement import Deviation, compare
from lightning_modules.exporting.decision import thresholds
from lightning_modules.exporting.formats import FORMATS, Format, traced
from lightning_modules.exporting.graph import Scorer
from lightning_modules.exporting.images import CheckImages, check_images
from lightning_modules.running.finding import find_run
from lightning_modules.running.loading import TrainedModel, load_run, part_of
from lightning_modules.running.quiet import quiet
from lightning_modules.running.settings import work_folder
from results.aggregator.records import read_record
from results.common import trouble
from results.common.files import replacing


def export(
    record: Path,
    kind: str,
    out: Path,
    category: str | None = None,
    images: str | None = None,
    rule: str | None = None,
    alpha: float | None = None,
) -> str:
    """Writes the file of a run, checks it, and says what it is.

    Args:
        record: The run's record.
        kind: `onnx` or `torch`.
        out: The file.
        category: Which model to take of a run with one per category, and what to tell a method that asks.
        images: Photographs to check the file with; by default the run's test images.
        rule, alpha: Of the thresholds in the metadata; by default the run's own.

    Raises:
        ValueError: a package is missing, the method cannot be exported, or the file disagrees with the run; there is then no
            file.
        FileNotFoundError: as `load_run`.
    """
    form = FORMATS[kind]
    form.check_packages()
    record = part_of(record, category) if category else record
    model, stored = load_run(record, category=category), read_record(record)
    decision = thresholds(record, yaml.safe_load(stored.config_text).get("run") or {}, model.category, rule, alpha)
    scorer = Scorer(model)
    shown = check_images(record, model.category, model.preparation, images)
    about = metadata.describe(model, scorer.outputs, stored, decision)
    with replacing(out) as part:
        try:
            made = form.convert(traced(scorer, shown.pixels, form), scorer.outputs)
            form.save(made, about, part)
        except DataError:  # says what to do
            raise
        except Exception as error:
            reason = _first_line(error)
            raise ValueError(f"{model.module.method} cannot be exported with these options: {reason}") from error
        deviations = compare(model, scorer.outputs, shown, form.open(part))
        form.save(made, about | {"check": metadata.checked(shown.source, form.program, deviations)}, part)
        size = part.stat().st_size
    return "\n".join([*_report(out, size, model, form, shown, deviations), *_decisions(decision)])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _report(
    out: Path, size: int, model: TrainedModel, form: Format, shown: CheckImages, deviations: Sequence[Deviation]
) -> list[str]:
    height, width = model.preparation.size
    lines = [
        f"{out} ({size / 2**20:.1f} MiB): images uint8 (batch, {height}, {width}, 3) -> "
        f"{' and '.join(d.name for d in deviations)}, float32",
        f"read back and run by {form.program} on {shown.source}:",
    ]
    lines += [
        f"  {d.name}: at most {d.largest:.2g} from the run's, of {d.low:.4g} to {d.high:.4g}; rounding explains {d.tolerance:.2g}"
        for d in deviations
    ]
    if (recorded := deviations[-1].recorded) is not None:
        lines.append(f"  image scores in the run's record: at most {recorded:.2g} from the file's")
    if model.precision != "32-true":
        lines.append(f"The run scores in {model.precision}, the file in float32; both computed in float32 here.")
    return lines


def _decisions(decision: Mapping[str, Any]) -> list[str]:
    """The thresholds in words."""
    if not decision["thresholds"]:
        return [f"no threshold: {decision['reason']}"]
    lines = []
    for name, found in decision["thresholds"].items():
        if found["image"] is None:
            lines.append(f"{name}: no threshold: {found['reason']}")
        else:
            lines.append(
                f"{name}: defect above {found['image']:.6g} (rule {decision['rule']}, {found['basis']} images)"
            )
    return lines


def main(arguments: list[str] | None = None) -> None:
    if code := trouble.told(_main, arguments, code=1):
        raise SystemExit(code)


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules.exporting", description=__doc__)
    parser.add_argument("--run", required=True, help="name or record folder of a finished run")
    parser.add_argument(
        "--format", default="onnx", choices=FORMATS, help="torch is a file of torch.export (default: onnx)"
    )
    parser.add_argument("--out", type=Path, help="the file (default: beside the run's checkpoints)")
    parser.add_argument(
        "--category", help="which model of a run with one per category; what to tell a method that asks"
    )
    parser.add_argument("--images", help="photographs to check the file with instead of the run's test images")
    parser.add_argument("--rule", help="of the thresholds (default: the run's own)")
    parser.add_argument("--alpha", type=float, help="wanted rate of false alarms (default: the run's own)")
    options = parser.parse_args(arguments)
    quiet()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    form = FORMATS[options.format]
    record = find_run(options.run)
    name = f"{record.name}-{options.category}".replace("/", "-") if options.category else record.name
    out = options.out or work_folder(record) / "export" / f"{name}{form.suffix}"
    if out.suffix != form.suffix:
        raise ValueError(f"--out is {out}; a file of format {options.format} ends in {form.suffix}.")
    torch.backends.cudnn.allow_tf32 = False
    print(export(record, options.format, out, options.category, options.images, options.rule, options.alpha))


if __name__ == "__main__":
    main()
