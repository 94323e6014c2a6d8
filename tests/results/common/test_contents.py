"""The identity of data is its contents, read once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from results.common import contents
from results.common.contents import content_hashes, data_hash, files_below


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set whose files are old enough to be remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contents, "RECENT", -(10**12))
    for name in ("bolt/train/good/1.bmp", "bolt/ground_truth/hole/1.tiff", "nut/train/good/1.jfif", "split.csv"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "data"


def replaced(path: Path, keep_time: bool = True) -> None:
    """Other bytes of the same size under the same name."""
    before = path.stat()
    part = path.with_suffix(".part")
    part.write_bytes(bytes(reversed(path.read_bytes())))
    part.rename(path)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["bolt/train/good/1.bmp", "bolt/ground_truth/hole/1.tiff", "split.csv"])
def test_other_bytes_of_the_same_size_and_time_are_other_data(data: Path, name: str) -> None:
    before = data_hash(data)
    assert data_hash(data) == before
    replaced(data / name)
    assert data_hash(data) != before


def test_bytes_changed_in_place_with_the_time_kept_are_noticed(data: Path) -> None:
    before, file = data_hash(data), data / "split.csv"
    times = file.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"another.c")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data_hash(data) != before


def test_a_file_changed_just_now_is_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "RECENT", 10**10)
    data_hash(data)
    monkeypatch.setattr(contents, "_state", lambda status: f"0 0 0 {time.time_ns()}")  # a clock too coarse to tell
    before = data_hash(data)
    (data / "split.csv").write_bytes(b"another.c")
    assert data_hash(data) != before


def test_unchanged_files_are_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = data_hash(data)
    monkeypatch.setattr(contents, "_hash", lambda path: pytest.fail(f"{path} was read again"))
    assert data_hash(data) == before


def test_files_of_odd_names_and_outside_the_folder_are_not_read_again_either(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["line\nbreak.png", "b\udce4d.png", "\u6f22\u5b57.png", "spaced  name.png", "../beside.png"]
    for name in names:
        (data / name).write_bytes(os.fsencode(name))
    files = [f"{data}/{name}" for name in names]
    before = content_hashes(files, data)
    assert before == [contents.file_hash(file) for file in files]
    monkeypatch.setattr(contents, "_hash", lambda path: pytest.fail(f"{path} was read again"))
    assert content_hashes(files, data) == before
    monkeypatch.setattr(contents, "MEMORY", tmp_path / contents.MEMORY)
    monkeypatch.chdir(data)
    assert content_hashes(names[:1], ".") == before[:1]


def test_one_new_file_among_many_is_the_only_one_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read, hashed = data_hash(data), [], contents._hash
    replaced(data / "split.csv")
    monkeypatch.setattr(contents, "_hash", lambda path: read.append(path) or hashed(path))
    assert data_hash(data) != before
    assert read == [str(data / "split.csv")]


@pytest.mark.parametrize("damage", [b"", b"\0" * 50, b"0123\n{}"])
def test_a_damaged_memory_is_built_anew(data: Path, damage: bytes) -> None:
    before = data_hash(data)
    (memory,) = contents.MEMORY.iterdir()
    memory.write_bytes(damage)
    assert data_hash(data) == before
    assert memory.read_bytes() != damage


def test_a_place_that_cannot_be_written_is_no_obstacle(data: Path) -> None:
    contents.MEMORY.parent.mkdir(parents=True)
    contents.MEMORY.write_text("a file where the folder should be")
    assert data_hash(data) == data_hash(data)


def test_linked_folders_are_data_and_circles_end(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "store")
    data.mkdir()
    for category in ("bolt", "nut"):
        (data / category).symlink_to(tmp_path / "store" / category)
    (data / "bolt" / "train" / "around").symlink_to(data)
    names = {os.path.relpath(path, data) for path in files_below(data)}
    assert {"bolt/train/good/1.bmp", "nut/train/good/1.jfif"} <= names
    before = data_hash(data, ["bolt"])
    (tmp_path / "store" / "bolt" / "train" / "good" / "2.bmp").write_bytes(b"new")
    assert data_hash(data, ["bolt"]) != before


def test_links_to_nothing_and_to_themselves_do_not_count(data: Path) -> None:
    before = data_hash(data), data_hash(data, ["bolt"])
    for folder in (data, data / "bolt" / "train"):
        (folder / "itself").symlink_to(folder / "itself")
        (folder / "dead.png").symlink_to(folder / "nowhere.png")
    assert (data_hash(data), data_hash(data, ["bolt"])) == before


def test_place_and_other_categories_do_not_matter(data: Path, tmp_path: Path) -> None:
    before = data_hash(data, ["bolt"])
    (data / "nut" / "train" / "good" / "1.jfif").write_bytes(b"other")
    (data / "bolt" / "Thumbs.db").write_bytes(b"clutter")
    assert data_hash(data, ["bolt"]) == before
    data.rename(tmp_path / "moved")
    assert data_hash(tmp_path / "moved", ["bolt"]) == before


def test_the_same_file_twice_has_one_hash(data: Path) -> None:
    file = data / "split.csv"
    assert len({*content_hashes([file, str(file)], data)}) == 1
