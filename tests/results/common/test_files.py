"""Files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from results.common import files
from results.common.did_you_mean import did_you_mean


def test_a_name_appears_only_when_its_content_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), replace(old, new)))
    files.write_json(tmp_path / "new" / "a.json", {"a": Path("b")})
    assert order == ["fsync", "rename", "fsync"]
    assert files.read_json(tmp_path / "new" / "a.json") == {"a": "b"}


def test_a_write_that_fails_leaves_the_old_content_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "a.txt", "old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[1]", b'{"a": ', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_json_file_reads_as_missing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert files.read_json(tmp_path / "a.json") == {}


def test_the_nearest_name_is_told_and_long_lists_are_not() -> None:
    assert did_you_mean("Bottle", ["bottle", "cable"]) == "Did you mean 'bottle'? Known: bottle, cable."
    assert did_you_mean("x", []) == "Known: none."
    many = [f"option_{number}" for number in range(200)]
    assert did_you_mean("batch_size_eval", [*many, "eval_batch_size"]) == "Did you mean 'eval_batch_size'?"
