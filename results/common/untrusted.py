"""What arrives from others is data: read within limits of size and depth, compared with its checksums, never left.

A record may come from another machine, from W&B or from a mail. Everything that is read of one goes through here first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

DEPTH = 40
"""Nested mappings and lists; a configuration has about ten."""
NODES = 200_000
"""Values of one YAML file after its aliases are written out."""
PICTURES = (".png", ".jpg", ".jpeg")
"""Endings of attachments whose checksums are compared when they are shown, not whenever a table is made."""
_LIMITS = {"record.json": 4 << 20, "config.yaml": 4 << 20, "metrics.csv": 64 << 20}  # bytes
_OTHERS = 1 << 30
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20


class UntrustedError(ValueError):
    """Data that cannot be taken; the message names the file and what is wrong with it."""


def file_inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder; UntrustedError if it is missing, not a plain file, too large or not inside.

    Args:
        folder: The folder, which may itself be reached by a link.
        name: Relative, with `/` between the parts.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UntrustedError(f"{name!r} is not a path inside the record")
    path = folder.joinpath(*parts)
    try:
        status = os.lstat(path)
        inside = len(parts) == 1 and not stat.S_ISLNK(status.st_mode)  # most files: no link to follow
        if not inside:
            status = os.stat(path)
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except FileNotFoundError:
        raise UntrustedError(f"no {name}") from None
    except (OSError, ValueError) as error:
        raise UntrustedError(f"{name} cannot be read: {error}") from None
    if not inside:
        raise UntrustedError(f"{name} is a link that leads out of the record")
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedError(f"{name} is not a plain file")
    limit = _LIMITS.get(name, _OTHERS)
    if status.st_size > limit:
        raise UntrustedError(f"{name} has {status.st_size >> 20} MiB; at most {limit >> 20} MiB are read")
    return path


def read_mapping(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file that holds a mapping; UntrustedError if it is anything else, nested too deeply, or has NaN in it."""
    path = file_inside(folder, name)
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UntrustedError(f"{name} is not readable JSON: {what}") from None
    if not isinstance(content, dict):
        raise UntrustedError(f"{name} holds {type(content).__name__} instead of a mapping")
    _check_depth(content, name)
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is not a number")


def _check_depth(value: Any, name: str) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise UntrustedError(f"{name} is nested deeper than {DEPTH} levels")


@functools.lru_cache(maxsize=4096)
def check_yaml(text: str, name: str) -> None:
    """UntrustedError if a YAML text is malformed, not a mapping, nested too deeply, or larger than it looks (alias bombs).

    Nothing is built: the text is only read through, at about 3 MB in a second.
    """
    sizes: dict[str, int] = {}
    open_: list[list[Any]] = []  # anchor and size of each collection that has begun
    kind: type | None = None
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            size = 1
            if isinstance(event, yaml.CollectionStartEvent):
                kind = kind or type(event)
                open_.append([event.anchor, 1])
                if len(open_) > DEPTH:
                    raise UntrustedError(f"{name} is nested deeper than {DEPTH} levels")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, size = open_.pop()
                sizes[anchor] = size
            elif isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise UntrustedError(f"{name}: *{event.anchor} stands inside of what it names, or names nothing")
                size = sizes[event.anchor]
            else:
                continue
            if size > NODES:
                raise UntrustedError(f"{name} holds more than {NODES:,} values once its aliases are written out")
            if open_:
                open_[-1][1] += size
            else:
                kind = kind or type(event)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UntrustedError):
            raise
        raise UntrustedError(f"{name} is not readable YAML: {' '.join(str(error).split())}") from None
    if kind not in (None, yaml.MappingStartEvent):
        raise UntrustedError(f"{name} holds no mapping of options")


def checksums(description: Mapping[str, Any]) -> dict[str, str]:
    """File -> sha256, as a record.json lists them under `files`; {} if it has none."""
    files = description.get("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) for checksum in files.values()
    ):
        raise UntrustedError(f"record.json: files is {str(files)[:60]}; it must map names to sha256 checksums")
    return files


def check_files(folder: Path, files: Mapping[str, str], pictures: bool = True) -> None:
    """UntrustedError unless every listed file has its checksum; without `pictures` those are only looked for."""
    for name, checksum in files.items():
        path = file_inside(folder, name)
        if (pictures or not name.lower().endswith(PICTURES)) and sha256(path) != checksum:
            raise UntrustedError(f"{name} is not what the run wrote (checksum differs): cut off or edited by hand")


def sha256(path: Path) -> str:
    """Checksum of a file, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
