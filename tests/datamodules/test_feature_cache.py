"""The feature cache gives back what was computed, or computes it again: never anything else."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.__main__ import main
from datamodules.cache.entry import CacheSpec, FeatureCache, NonFiniteFeaturesError, open_or_build
from datamodules.cache.folder import CacheTooLargeError, entries
from datamodules.cache.loaders import CachedBatches
from datamodules.dataset import Row

ROWS, SIZE, BUDGET = 10, (8, 12), 10**9


def spec(**changes) -> CacheSpec:
    given = {
        "content": "abc",
        "image_size": SIZE,
        "resize": "pil_bilinear",
        "backbone": {"name": "n", "levels": [1, 2]},
    }
    return CacheSpec(**given | changes)


def truth(row: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Levels, mask and image of one row, as batches of one."""
    generator = torch.Generator().manual_seed(row)
    levels = [torch.randn(1, 3, 4, 6, generator=generator), torch.randn(1, 5, 2, 3, generator=generator)]
    mask = torch.rand(1, 1, *SIZE, generator=generator) > 0.7
    return levels, mask, torch.randint(0, 256, (1, 3, *SIZE), generator=generator, dtype=torch.uint8)


class PowerCut(RuntimeError):
    pass


class Backbone:
    """Computes batches of three rows and notes from where; may fail before a row."""

    def __init__(self, fails_at: int = ROWS, images: bool = False) -> None:
        self.calls: list[int] = []
        self.fails_at, self.images = fails_at, images

    def __call__(self, first: int):
        self.calls.append(first)
        for start in range(first, ROWS, 3):
            rows = [truth(row) for row in range(start, min(start + 3, ROWS))]
            if min(start + 3, ROWS) > self.fails_at:
                raise PowerCut
            levels = [torch.cat(parts) for parts in zip(*(levels for levels, _, _ in rows), strict=True)]
            images = torch.cat([image for _, _, image in rows]) if self.images else None
            yield levels, torch.cat([mask for _, mask, _ in rows]), images


def assert_holds_the_truth(cache: FeatureCache) -> None:
    for row in range(ROWS):
        levels, mask, _ = truth(row)
        for stored, level in zip(cache.levels, levels, strict=True):
            assert np.array_equal(stored[row], level[0].numpy())
        bits = np.unpackbits(cache.masks[row], count=SIZE[0] * SIZE[1]).reshape(SIZE)
        assert np.array_equal(bits.astype(bool), mask[0, 0].numpy())


def test_float32_gives_back_every_bit(tmp_path):
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET))


def test_float16_gives_back_the_nearest_half(tmp_path):
    cache = open_or_build(tmp_path, spec(dtype="float16"), ROWS, Backbone(), BUDGET)
    assert cache.levels[0].dtype == np.float16
    assert np.array_equal(cache.levels[0][4], truth(4)[0][0][0].half().numpy())


def test_images_are_kept_when_asked_for(tmp_path):
    cache = open_or_build(tmp_path, spec(images=True), ROWS, Backbone(images=True), BUDGET)
    assert np.array_equal(cache.images[7], truth(7)[2][0].numpy())


def test_a_second_reader_computes_nothing(tmp_path):
    open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET)
    second = Backbone()
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, second, BUDGET))
    assert second.calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"content": "abd"},
        {"image_size": (12, 8)},
        {"resize": "pil_lanczos"},
        {"backbone": {"name": "n", "levels": [1, 2], "sha256": "other"}},
        {"preparation": "pooled"},
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"dtype": "float16"},
        {"images": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_that_changes_the_content_changes_the_entry(change):
    assert spec(**change).key != spec().key


@pytest.mark.parametrize("file", ["level0.npy", "level1.npy", "mask.npy", "checksums.npy"])
def test_a_damaged_byte_is_noticed_and_the_entry_built_anew(tmp_path, file):
    folder = open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET).folder
    content = bytearray((folder / file).read_bytes())
    content[-5] ^= 1
    (folder / file).write_bytes(content)
    told, again = [], Backbone()
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, again, BUDGET, told.append))
    assert again.calls == [0]
    assert any("damaged" in message for message in told)


@pytest.mark.parametrize("damage", ["truncated", "missing", "meta"])
def test_an_entry_with_broken_files_is_built_anew(tmp_path, damage):
    folder = open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET).folder
    if damage == "truncated":
        os.truncate(folder / "level0.npy", 300)
    elif damage == "missing":
        (folder / "level0.npy").unlink()
    else:
        (folder / "meta.json").write_text("{")
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET))


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.cache.entry.FLUSH_EVERY", 3)
    with pytest.raises(PowerCut):
        open_or_build(tmp_path, spec(), ROWS, Backbone(fails_at=7), BUDGET)
    assert not (tmp_path / spec().key).exists()
    second = Backbone()
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, second, BUDGET))
    assert second.calls == [6]


def test_a_damaged_part_of_an_interrupted_build_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.cache.entry.FLUSH_EVERY", 3)
    with pytest.raises(PowerCut):
        open_or_build(tmp_path, spec(), ROWS, Backbone(fails_at=7), BUDGET)
    partial = tmp_path / f"{spec().key}.partial"
    level = np.lib.format.open_memmap(partial / "level0.npy", "r+")
    level[4] += 1
    level.flush()
    second = Backbone()
    assert_holds_the_truth(open_or_build(tmp_path, spec(), ROWS, second, BUDGET))
    assert second.calls == [4]


def test_nan_features_are_refused_and_not_kept(tmp_path):
    def compute(first):
        levels, mask, _ = truth(0)
        yield [levels[0] * torch.nan, levels[1]], mask, None

    with pytest.raises(NonFiniteFeaturesError, match="images 0 to 0 hold NaN"):
        open_or_build(tmp_path, spec(), ROWS, compute, BUDGET)
    assert entries(tmp_path) == []


def test_features_too_large_for_float16_are_refused_with_the_way_out(tmp_path):
    def compute(first):
        levels, mask, _ = truth(0)
        yield [levels[0] * 1e6], mask, None

    with pytest.raises(NonFiniteFeaturesError, match="float32 holds more"):
        open_or_build(tmp_path, spec(dtype="float16"), ROWS, compute, BUDGET)


def test_the_size_is_told_before_anything_is_written(tmp_path):
    def announce(message: str) -> None:
        assert list(tmp_path.glob("*/*.npy")) == []
        told.append(message)

    told: list[str] = []
    open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET, announce)
    assert "GiB" in told[0]


def test_an_entry_beyond_the_budget_is_refused(tmp_path):
    with pytest.raises(CacheTooLargeError, match="the budget is"):
        open_or_build(tmp_path, spec(), ROWS, Backbone(), 1000)


def test_the_least_recently_used_entry_makes_room(tmp_path):
    old, used = (open_or_build(tmp_path, spec(content=name), ROWS, Backbone(), BUDGET) for name in ("old", "used"))
    for cache, seconds in ((old, 100), (used, 50)):
        moment = time.time() - seconds
        os.utime(cache.folder / "meta.json", (moment, moment))
    open_or_build(tmp_path, spec(content="old"), ROWS, Backbone(), BUDGET)  # read again: now `used` is the older one
    one = entries(tmp_path)[0].nbytes
    open_or_build(tmp_path, spec(content="new"), ROWS, Backbone(), int(2.5 * one))
    assert old.folder.exists()
    assert not used.folder.exists()


def _build_slowly(root: Path, queue) -> None:
    backbone = Backbone()

    def compute(first):
        for batch in backbone(first):
            time.sleep(0.05)
            yield batch

    assert_holds_the_truth(open_or_build(root, spec(), ROWS, compute, BUDGET))
    queue.put(len(backbone.calls))


def test_of_two_processes_one_builds_and_the_other_waits_for_it(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build_slowly, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(queue.get(timeout=60) for _ in processes) == [0, 1]
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_entries_can_be_listed_and_deleted(tmp_path, capsys):
    keys = [open_or_build(tmp_path, spec(content=c), ROWS, Backbone(), BUDGET).folder.name for c in ("a", "b")]
    assert main(["cache", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(key[:8] in shown for key in keys)
    assert main(["cache", "--root", str(tmp_path), "--clear", keys[0]]) == 0
    assert [entry.key for entry in entries(tmp_path)] == [keys[1]]
    assert main(["cache", "--root", str(tmp_path), "--clear", "nonsense"]) == 2
    assert main(["cache", "--root", str(tmp_path), "--clear", "all"]) == 0
    assert entries(tmp_path) == []


def test_an_entry_of_an_older_layout_is_told_in_one_line_and_built_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("datamodules.cache.entry.VERSION", 3)
        old = open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET).folder
    told, again = [], Backbone()
    cache = open_or_build(tmp_path, spec(), ROWS, again, BUDGET, told.append)
    assert_holds_the_truth(cache)
    assert again.calls == [0]
    assert cache.folder != old
    assert not old.exists()
    (line,) = (line for line in told if "older layout" in line)
    assert str(old) in line
    open_or_build(tmp_path, spec(), ROWS, again, BUDGET, told.append)
    assert len([line for line in told if "older layout" in line]) == 1


@pytest.mark.program
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_a_process_does_not_grow_with_the_entry_that_it_builds_and_reads(tmp_path):
    """128 MiB of features may take some batches' worth of memory (4 MiB each), not their own size."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # other tests leave their memory in ours
        pool.submit(_growth, tmp_path / "first", 8).result()  # what is loaded on first use also counts as memory
        assert pool.submit(_growth, tmp_path / "second", 128).result() < 32 * 2**20


def _growth(root: Path, rows: int) -> int:
    """Bytes that a process grows by while it builds and reads an entry of as many MiB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    peaks = []

    def compute(first: int):
        for _ in range(first, rows, 4):
            yield [torch.ones(4, 256, 32, 32)], torch.zeros(4, 1, *SIZE, dtype=torch.bool), None
            peaks.append(resident())

    before = resident()
    cache = open_or_build(root, spec(), rows, compute, BUDGET)
    assert cache.is_intact()
    peaks.append(resident())
    batches = CachedBatches(cache, [Row(i, "d", "c", 0, "good", "", ()) for i in range(rows)], np.zeros((3, 256)), None)
    for start in range(0, rows, 4):
        batches[list(range(start, start + 4))]
        peaks.append(resident())
    return max(peaks) - before


def test_an_entry_of_another_user_is_read_without_writing_anything(tmp_path, monkeypatch):
    open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()

    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr("datamodules.cache.entry.locked", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    backbone = Backbone()
    assert open_or_build(tmp_path, spec(), ROWS, backbone, BUDGET).is_intact()
    assert backbone.calls == []


def test_an_entry_that_is_missing_in_another_users_folder_is_built_in_ones_own(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shared)
    said: list[str] = []
    cache = open_or_build(shared, spec(), ROWS, Backbone(), BUDGET, said.append)
    assert cache.folder.is_relative_to(tmp_path / "own")
    assert list(shared.iterdir()) == []
    assert f"{shared} cannot be written" in said[0]


def test_a_disk_that_is_full_is_said_before_the_first_row_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CacheTooLargeError, match="No space left"):
        open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("file", ["meta.json", "level0.npy", "checksums.npy"])
def test_an_entry_with_an_empty_file_after_a_lost_power_is_built_anew(tmp_path, file):
    folder = open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET).folder
    (folder / file).write_bytes(b"")
    assert open_or_build(tmp_path, spec(), ROWS, Backbone(), BUDGET).is_intact()


def test_a_memory_mapped_array_still_lies_directly_in_the_mapping_that_is_let_go(tmp_path):
    """When this fails, NumPy has changed, and `datamodules.cache.entry._let_go` needs another way."""
    np.save(tmp_path / "a.npy", np.zeros(3, np.float32))
    assert isinstance(np.load(tmp_path / "a.npy", mmap_mode="r").base, mmap.mmap)
    made = np.lib.format.open_memmap(tmp_path / "b.npy", mode="w+", dtype=np.float32, shape=(3,))
    assert isinstance(made.base, mmap.mmap)
