"""A run by its name: people type `mine`, not the path of its record."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.running.settings import RunConfig
from results.common.did_you_mean import did_you_mean
from results.common.files import restore_replaced

CONFIG = "config.yaml"


class NoRunError(ValueError):
    """No finished run is meant by what was given."""


def find_run(given: str | Path, results: str | Path = RunConfig.results) -> Path:
    """The record of a finished run.

    Args:
        given: The record's folder, its `config.yaml`, a run's name (`mine`), or `<sweep>/<name>`.
        results: The folder that holds `runs/`.

    Returns:
        The record's folder.

    Raises:
        NoRunError: nothing or several runs are meant; names the nearest ones, and what to do.
    """
    text = str(given)
    folder = Path(text).expanduser()
    folder = folder.parent if folder.name == CONFIG else folder
    if text:
        restore_replaced(folder.parent)  # where a record lies whose replacing was cut off
        if (folder / CONFIG).is_file():
            return folder
    known = finished_runs(results)
    inside = f" The folder {folder} holds no record of a finished run." if text and folder.is_dir() else ""
    if not known:
        runs = Path(results) / "runs"
        raise NoRunError(
            f"{_no_run(text)}.{inside} {runs} holds no finished run yet: train one with make train RUN=<name>."
        )
    meant = [record for name, record in known.items() if text and text in (name, record.name)]
    if len(meant) > 1:
        raise NoRunError(f"Several runs are called {text!r}: {', '.join(_named(meant))}. Give one of these.")
    if not meant:
        alone = [record.name for record in known.values()]
        names = [record.name if alone.count(record.name) == 1 else name for name, record in known.items()]
        raise NoRunError(f"{_no_run(text)}.{inside} {did_you_mean(text, names)}")
    return meant[0]


def finished_runs(results: str | Path = RunConfig.results) -> dict[str, Path]:
    """`<sweep>/<name>` -> folder of every record of a finished run, in the order of the names."""
    found = sorted((Path(results) / "runs").glob(f"[!.]*/[!.]*/{CONFIG}"))
    return {f"{file.parent.parent.name}/{file.parent.name}": file.parent for file in found}


def _no_run(text: str) -> str:
    return f"There is no run {text!r}" if text else "No run is named: give RUN=<name or record folder>"


def _named(records: list[Path]) -> list[str]:
    return [f"{record.parent.name}/{record.name}" for record in records]
