"""`make bench` measures, and what it prints is what it measured."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lightning_modules.benchmarks import inference, start
from lightning_modules.benchmarks import training as benchmark
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig
from results.common import contents


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Of the smallest benchmark, in this process."""
    monkeypatch.setattr(benchmark, "in_own_process", lambda task, *rest: getattr(benchmark, task)(*rest))
    tiny = "--methods=identical_shortcut --images=4 --native=64 --categories=1 --image-size=32 --steps=1 --rounds=1"
    benchmark.main([*tiny.split(), f"--output={tmp_path}"])
    report = json.loads((tmp_path / "bench.json").read_text())
    report["text"] = (tmp_path / "bench.txt").read_text()
    return report


@pytest.mark.program
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_measures_pace_memory_work_sweep_growth_and_float16(report):
    (row,) = report["methods"]
    for name in ("train_images_per_second", "train_ratio", "score_images_per_second", "score_ratio"):
        (value,) = row[name]
        assert value > 0, name
    assert row["peak_memory_bytes"] > 2**20
    assert row["flops_per_image"] == {name: 2 * macs for name, macs in row["macs_per_image"].items()}
    assert row["sweep_seconds"] < row["separate_runs_seconds"]
    first, more_images, more_categories, larger = report["growth"]
    assert more_images["images"] > first["images"]
    assert more_categories["categories"] == 2 * first["categories"]
    assert larger["image_size"] == [64, 64]
    assert larger["macs_per_image"]["backbone"] > first["macs_per_image"]["backbone"]
    assert {row["metric"] for row in report["float16"]} >= {"image_auroc", "pixel_ap"}
    (sizes,) = (row for row in report["float16"] if row["metric"] == "cache_bytes")
    assert sizes["float16"] < 0.7 * sizes["float32"]  # masks and checksums are the same in both
    for title in ("Pace", "Work per image", "Data and backbone", "Growth", "Cache in float16"):
        assert title in report["text"]


def test_macs_are_those_of_the_matrix_products():
    """Counted by hand for a UniAD of one encoder and one decoder layer with L = 4 tokens."""
    backbone = BackboneConfig("test_efficientnet.r160_in1k", (3, 4), "random")
    model = UniAD(
        backbone, image_size=32, d_model=8, heads=2, feedforward=16, encoder_layers=1, decoder_layers=1, neighbor_size=1
    )
    tokens, channels, width, hidden = (
        model.network.grid[0] * model.network.grid[1],
        sum(model.extractor.channels),
        8,
        16,
    )
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    feedforward = 2 * tokens * width * hidden
    expected = 2 * tokens * channels * width + 3 * attention + 2 * feedforward
    assert benchmark.count_macs(model)["network"] == expected


def test_a_new_method_is_measured_without_an_edit_of_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    assert benchmark.Options().methods[0] == benchmark.FIRST
    for name, path in (("mine", "lightning_modules.uniad.UniAD"), ("bank", "lightning_modules.padim.PaDiM")):
        (tmp_path / "demo" / f"{name}.yaml").write_text(f"model: {{class_path: {path}}}")
    monkeypatch.setattr(benchmark, "PROFILES", tmp_path)
    assert benchmark.Options().methods == ("mine",), "a memory bank has no training steps to measure"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--methods=unaid", "Did you mean 'uniad'"),
        ("--methods=padim", "cannot be measured"),
        ("--steps=0", "at least 1"),
        ("--images=1", "at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(argument, words):
    with pytest.raises(SystemExit, match=words):
        benchmark.main([argument])


def test_the_benchmark_of_the_start_reads_files_when_cold_and_not_when_warm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contents, "RECENT", -(10**18))
    read: list[str] = []
    hashed = contents._hash
    monkeypatch.setattr(contents, "_hash", lambda path: read.append(path) or hashed(path))
    start.write_tree(tmp_path / "data", 20)
    found = {state: (start.first_batch(tmp_path / "data", state), len(read)) for state in ("cold", "warm")}
    assert [count for _, count in found.values()] == [20, 20]
    assert all(seconds["cpu"] > 0 for seconds, _ in found.values())


def test_the_table_of_scoring_fits_80_columns_and_says_why_an_engine_is_missing():
    done = {"peak": 1075 * 2**20, "ready": 159.7, "device": "CPU, 2 threads", "batch": 32}
    rows = [
        {"engine": "onnxruntime", "latency": [12345.6, 12300.4, 12999.9], **done},
        {"engine": "torch", "latency": [51.46, 50.0, 60.02], **done, "batch": 1},
        {"engine": "compiled", "batch": 1, "latency": [], "peak": 0, "reason": "no C++ compiler [c++] is on PATH"},
    ]
    written = io.StringIO()
    found = {"run": "results/runs/single/mine", "rounds": 3, "rows": rows}
    Console(file=written, width=inference.WIDTH).print(inference.table(found))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["onnxruntime", "32", "12346 [12300, 13000]", "2.6", "1075", "159.7"],
        ["torch", "1", "51.5 [50.0, 60.0]", "19.4", "1075", "159.7"],
        ["compiled", "1", "-", "-", "-", "-"],
    ]
    assert "compiled: no C++ compiler [c++] is on PATH" in written.getvalue()


@pytest.mark.program
@pytest.mark.filterwarnings("ignore")
def test_the_parts_of_the_memory_bank_methods_agree_with_anomalibs():
    pytest.importorskip("anomalib", reason="make baselines installs anomalib")
    from argparse import Namespace

    from lightning_modules.benchmarks import against_anomalib as bench

    options = Namespace(backbone="tf_efficientnet_lite0.in1k", size=64, ratio=0.05, threads=1)
    part = "PatchCore, coreset"
    ours, theirs = (bench.measure(part, system, options) for system in bench.SYSTEMS)
    assert ours["bank"] == theirs["bank"]
    ours, theirs = (bench.measure("PaDiM, fit and distances", system, options) for system in bench.SYSTEMS)
    # Theirs multiplies by an explicit inverse in float32; the covariances' condition is below 1e4.
    assert ours["mean distance"] == pytest.approx(theirs["mean distance"], rel=1e-3)
    assert bench.measure("PatchCore, search", "ours", options)["largest error"] < 1e-4
