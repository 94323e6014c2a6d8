"""Reference records: run records that come with the project, below `results/reference`, for tables before any training.

They are made by `make reference` from runs of one's own, without checkpoints, with no path of the machine and with small
pictures of default rows only. They never count as finished: a sweep trains into `results/runs`. Where a cell has runs of
one's own, tables show those, else the reference, marked with a dagger; the two are never averaged and never in conflict.
"""

from __future__ import annotations

import functools
import io
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from results.aggregator.records import (
    HEATMAPS,
    RecordError,
    RecordSet,
    StoredRecord,
    data_options,
    read_records,
    write_record,
)
from results.aggregator.scores import METHOD_AXES, TABLE_AXES, axis_value, data_of
from results.aggregator.spec import Spec
from results.aggregator.sweep_cells import canonical
from results.common.code import code_hash

FOLDER = Path("results/reference")
SMALL = "verify"
"""The sweep of small cells that `make verify` runs again; no table shows it."""
PLAN = "plan.yaml"
"""What is to be trained for them, beside the records."""
MARK = "†"
CODE = "code"
"""Key of a reference record's provenance: `hash` of its code, `roots` it was reached from, place of its `data`."""
LEFT_OUT = ("normal_scores.csv", "normal_pixels.csv", "category_features.csv", "colour_scale.json")
"""Attachments that only `predict` reads, which needs a checkpoint."""
WIDTH, QUALITY = 400, 50
"""Of a reference record's pictures: largest width in pixels, and JPEG quality."""
_PLACE = re.compile(r"(?<![\w.:/~$}-])(?:/[\w.+~-]+){2,}/?|(?<!\w)[A-Za-z]:\\[^\s\"',]+|~/[^\s\"',]+")
_ROOT = Path(__file__).resolve().parents[2]


def read_reference(root: str | Path = FOLDER, sweep: str | None = None) -> RecordSet:
    """The reference records, of all sweeps or of one; none if the folder is not there."""
    root = Path(root)
    if not (root if sweep is None else root / sweep).is_dir():
        return RecordSet(())
    found = read_records(root, sweep, warn=False)
    return RecordSet(tuple(replace(stored, reference=True) for stored in found), found.damaged)


def same_cell(stored: StoredRecord) -> tuple[Any, ...]:
    """What two records have in common if they are one cell of one table: all but seed, code and exact data."""
    record = stored.record
    return (record.sweep, stored.cell, record.method, record.profile, record.protocol, record.setting, data_of(stored))


def complete(
    own: Iterable[StoredRecord],
    reference: Iterable[StoredRecord],
    varies: Callable[[str], Iterable[str]] = lambda sweep: (),
) -> list[StoredRecord]:
    """The own records, and the reference records of cells that have none and that may stand in one table with them.

    A reference record that disagrees with the sweep's own ones about what must agree in a table (`TABLE_AXES`,
    `METHOD_AXES`) is left out: own records are never refused for its sake.

    Args:
        own, reference: Of any sweeps.
        varies: The axes that a sweep compares on purpose.
    """
    own = list(own)
    taken = {same_cell(stored) for stored in own}
    mates: dict[tuple[Any, ...], list[StoredRecord]] = {}
    for stored in own:
        mates.setdefault((stored.record.sweep, stored.record.profile, stored.record.protocol), []).append(stored)
    kept = []
    for stored in reference:
        record = stored.record
        beside = mates.get((record.sweep, record.profile, record.protocol), [])
        if same_cell(stored) not in taken and _agrees(stored, beside, set(varies(record.sweep))):
            kept.append(stored)
    return own + kept


def _agrees(stored: StoredRecord, own: Sequence[StoredRecord], varies: set[str]) -> bool:
    for axis in (*TABLE_AXES, *METHOD_AXES):
        if axis in varies:
            continue
        if axis == "data":
            near = [other for other in own if _named(other) == _named(stored)]
            agrees = _prints(stored) in {_prints(other) for other in near}
        else:
            near = [other for other in own if axis in TABLE_AXES or other.record.method == stored.record.method]
            agrees = axis_value(stored, axis) in {axis_value(other, axis) for other in near}
        if near and not agrees:
            return False
    return True


def _named(stored: StoredRecord) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, categories) for name, categories, _ in data_of(stored)]


def _prints(stored: StoredRecord) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((d["name"], f"{d['fingerprint']}{data_options(d)}") for d in stored.record.datasets))


def notes(records: Sequence[StoredRecord]) -> list[str]:
    """What a table says of the reference records in it: that they are such, and whose code is older than what runs."""
    mine = [stored for stored in records if stored.reference]
    if not mine:
        return []
    found = [f"{MARK} Reference records, which come with the project; a run of yours takes the place of its cell's."]
    if older := [stored for stored in mine if is_older(stored)]:
        commits = sorted({str(stored.record.provenance.get("git_commit") or "unknown")[:10] for stored in older})
        count = "All" if len(older) == len(mine) else f"{len(older)} of the {len(mine)}"
        found.append(
            f"{count} reference records here are older than the code that runs now (commit {', '.join(commits)}): "
            "`make verify` shows whether that changes a number."
        )
    return found


def is_older(stored: StoredRecord) -> bool:
    """Whether the code that made a reference record, as far as it decides a result, is another than the code here."""
    code = stored.record.provenance.get(CODE)
    if not isinstance(code, dict) or not isinstance(code.get("roots"), list):
        return True
    return code.get("hash") != _code_now(tuple(map(str, code["roots"])))


@functools.lru_cache
def _code_now(roots: tuple[str, ...]) -> str:
    try:
        return code_hash(roots, _ROOT)
    except ValueError:  # a file that is being edited
        return ""


def is_default(stored: StoredRecord, spec: Spec) -> bool:
    """Whether the record's cell is the row that its sweep's table calls the default."""
    cells = [spec.default] if spec.default else []
    cells += [row.runs["cell"] for row in spec.rows or () if row.default and row.runs.get("cell")]
    return any(
        all(
            any((name == key or name.endswith(f".{key}")) and canonical(value) == canonical(wanted)
                for name, value in stored.record.cell.items())
            for key, wanted in cell.items()
        )
        for cell in cells
    )  # fmt: skip


def publish(
    stored: StoredRecord,
    code: Mapping[str, Any],
    pictures: bool,
    root: str | Path = FOLDER,
    project: Path | None = None,
    committed: bool = False,
) -> Path:
    """Write a run's record as a reference record, in place of the ones of the same cell and seed; returns its folder.

    Args:
        stored: A record of one's own.
        code: `hash` and `roots` of the code that made it, and where its `data` lay.
        pictures: Whether it keeps its heat maps, made smaller.
        root: The reference folder.
        project: The folder that paths are made relative to; by default the current one.
        committed: That the code which decides the result is known to be its commit's, whatever else had been changed.

    Raises:
        RecordError: the backbone was random, or a path of this machine is left in the record.
    """
    if stored.record.random_weights:
        raise RecordError(f"{stored.name} has a random backbone: no reference record has one")
    here = str((project or Path.cwd()).resolve())

    def bare(text: str) -> str:
        return text.replace(f"{here}/", "").replace(here, ".")

    came = {**stored.record.provenance, CODE: dict(code), **({"git_dirty": False} if committed else {})}
    record = replace(
        stored.record,
        cell=_scrubbed(stored.record.cell, bare),
        backbone=_scrubbed(stored.record.backbone, bare),
        datasets=_scrubbed(stored.record.datasets, bare),
        provenance=_scrubbed(came, bare),
        notes=_scrubbed(stored.record.notes, bare),
    )
    attachments: dict[str, bytes | str] = {}
    for name in stored.files:
        if name in ("metrics.csv", "history.csv", "config.yaml", *LEFT_OUT) or name.startswith("heatmaps/"):
            continue
        attachments[name] = bare((stored.path / name).read_text(encoding="utf-8"))
    if pictures and len(stored.heatmaps):
        attachments[HEATMAPS] = (stored.path / HEATMAPS).read_text(encoding="utf-8")
        for file in stored.heatmaps["file"].unique():
            attachments[f"heatmaps/{file}"] = smaller(stored.picture(file))
    config = bare(stored.config_text)
    texts = {"config.yaml": config, **{name: text for name, text in attachments.items() if isinstance(text, str)}}
    texts["record.json"] = str([record.cell, record.backbone, record.datasets, record.provenance, record.notes])
    for name, text in texts.items():
        if place := _PLACE.search(text):
            raise RecordError(f"{stored.name}: {name} names a place on this machine, {place[0]!r}; use relative paths")
    root = Path(root)
    earlier = [
        other.path
        for other in read_reference(root, record.sweep)
        if (same_cell(other)[:-1], other.record.seed, places(other))
        == (same_cell(stored)[:-1], record.seed, code.get("data"))
        and other.record.run != record.run
    ]
    path = write_record(root, record, stored.metrics, stored.history, config, attachments, overwrite=True)
    for folder in earlier:
        shutil.rmtree(folder)
    return path


def places(stored: StoredRecord) -> Any:
    """Where a reference record's data lay, relative to the project: what tells two layouts of one data set apart."""
    code = stored.record.provenance.get(CODE)
    return code.get("data") if isinstance(code, dict) else None


def _scrubbed(value: Any, bare: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return bare(value)
    if isinstance(value, dict):
        return {key: _scrubbed(part, bare) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(part, bare) for part in value]
    return value


def smaller(picture: bytes) -> bytes:
    """A JPEG of at most `WIDTH` pixels width."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
        if image.width > WIDTH:
            image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()
