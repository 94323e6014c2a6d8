"""Sweep files: the cells that W&B would make, and errors that say what to change."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from sweeps.__main__ import main
from sweeps.runner import checked_sweep, expansion
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell

COMMAND = ["${env}", "${interpreter}", "program.py", "${args}"]


def write(folder: Path, parameters: object, **more: object) -> str:
    path = folder / "toy.yaml"
    content = {"name": "toy", "method": "grid", "parameters": parameters, "command": COMMAND, **more}
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value != "absent"}))
    return str(path)


def test_grid_is_the_sorted_product_that_wandb_makes(tmp_path: Path) -> None:
    parameters = {"b.x": {"values": [2, 1]}, "a": {"values": [[4, 3], [1]]}, "c": {"value": True}}
    cells = checked_sweep.load(write(tmp_path, parameters)).cells()
    assert [list(cell.parameters.items()) for cell in cells] == [
        [("a", a), ("b.x", b), ("c", True)] for a, b in itertools.product([[4, 3], [1]], [2, 1])
    ]


def test_values_equal_for_wandb_are_one_cell_but_true_and_one_are_two(tmp_path: Path) -> None:
    cells = checked_sweep.load(write(tmp_path, {"a": {"values": [1.0, 1e-4, 1, "1", True]}})).cells()
    assert [cell.parameters["a"] for cell in cells] == [1, 1e-4, "1", True]
    assert isinstance(cells[0].parameters["a"], int), "the last spelling stays, and the command line shows it"


def test_integer_range_is_enumerated_with_its_end(tmp_path: Path) -> None:
    cells = checked_sweep.load(write(tmp_path, {"a": {"min": 1, "max": 3}})).cells()
    assert [cell.parameters["a"] for cell in cells] == [1, 2, 3]


def test_seeds_replace_the_files_seed_and_multiply_the_cells(tmp_path: Path) -> None:
    sweep = checked_sweep.load(write(tmp_path, {"a": {"values": [1, 2]}, "seed_everything": {"value": 7}}))
    assert [cell.seed for cell in sweep.cells()] == [7, 7]
    cells = sweep.cells(seeds=[0, 1, 2])
    assert [(cell.parameters["a"], cell.seed) for cell in cells] == list(itertools.product([1, 2], [0, 1, 2]))
    assert sweep.varying == ("a",)


def test_rows_that_set_several_options_at_once_are_shown_option_by_option(tmp_path: Path) -> None:
    rows = [{"levels": [4], "sar": "none", "width": 8}, {"levels": [4, 3], "sar": "none"}]
    cells = checked_sweep.load(write(tmp_path, {"model": {"values": rows}, "b": {"value": 1}})).cells()
    assert cells[0].settings == {"b": 1, "model.levels": [4], "model.sar": "none", "model.width": 8}
    assert expansion.varying(cells) == ("model.levels", "model.width")


def test_random_search_repeats_itself_and_keeps_its_first_cells_when_it_grows(tmp_path: Path) -> None:
    parameters = {
        "scale": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "size": {"min": 1, "max": 9},
        "share": {"min": 0.0, "max": 1.0},
        "step": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
        "query": {"values": ["none", "first"], "probabilities": [0.0, 1.0]},
        "noise": {"mu": 0.0, "sigma": 1.0},
        "seed_everything": {"values": [0, 1]},
    }
    sweep = checked_sweep.load(write(tmp_path, parameters, method="random", run_cap=20))
    cells = sweep.cells()
    assert len(cells) == 40
    assert cells == sweep.cells()
    assert cells[:10] == sweep.cells(count=5)
    assert cells != sweep.cells(sampler_seed=1)
    for even, odd in zip(cells[::2], cells[1::2], strict=True):
        assert (even.seed, odd.seed) == (0, 1)
        assert {**even.parameters, "seed_everything": 1} == odd.parameters
        values = even.parameters
        assert list(values) == sorted(values)
        assert 1e-4 <= values["scale"] <= 1e-1
        assert values["size"] in range(1, 10)
        assert 0 <= values["share"] <= 1
        assert values["step"] in (0, 0.25, 0.5, 0.75, 1)
        assert values["query"] == "first"


def test_random_search_without_an_end_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="run_cap"):
        checked_sweep.load(write(tmp_path, {"a": {"min": 0.0, "max": 1.0}}, method="random")).cells()


def test_bayes_says_that_it_needs_a_server(tmp_path: Path) -> None:
    metric = {"name": "image_auroc", "goal": "maximize"}
    sweep = checked_sweep.load(write(tmp_path, {"a": {"min": 0.0, "max": 1.0}}, method="bayes", metric=metric))
    with pytest.raises(SweepError, match=r"W&B.s server.*make wandb-sweep ABLATION=toy"):
        sweep.cells()


@pytest.mark.parametrize(
    ("parameters", "more", "message"),
    [
        ({"a": {"vals": [1]}}, {}, "'a'.*'vals'.*Did you mean 'values'"),
        ({"a": 3}, {}, "'a' is 3; write"),
        ({"--a": {"value": 3}}, {}, "starts without hyphens"),
        ({"a": {"parameters": {"b": {"value": 1}}}}, {}, r"nested.*a\.key"),
        ({"a": {"values": []}}, {}, "at least one value"),
        ({"a": {"values": [{"b": 1, "c": [None]}]}}, {}, "a mapping that holds one"),
        ({"a": {"values": [None, 1]}}, {}, 'write the string "null"'),
        ({"a": {"min": 3, "max": 1}}, {}, "min 3 is not below max 1"),
        ({"a": {"min": 3}}, {}, "max missing"),
        ({"a": {"distribution": "unifrom", "min": 0, "max": 1}}, {}, "Did you mean 'uniform'"),
        ({}, {}, "parameters must be a mapping"),
        ({"a": {"value": 1}}, {"parametres": {}}, "unknown key 'parametres'.*Did you mean 'parameters'"),
        ({"a": {"value": 1}}, {"method": "girds"}, "'girds'.*Did you mean 'grid'"),
        ({"a": {"value": 1}}, {"name": "other"}, "name is 'other'.*'toy'"),
        ({"a": {"value": 1}}, {"command": ["python"]}, r"\$\{args\}"),
        ({"a": {"value": 1}}, {"command": [*COMMAND, "--run.sweep=tox"]}, "--run.sweep=tox"),
        ({"a": {"value": 1}}, {"metric": {"name": "x", "goal": "up"}}, "minimize or maximize"),
        ({"a": {"value": 1}}, {"run_cap": 0}, "run_cap is 0"),
    ],
)  # fmt: skip
def test_mistake_in_a_sweep_file_is_named_with_its_place(
    tmp_path: Path, parameters: object, more: dict, message: str
) -> None:
    path = write(tmp_path, parameters, **more)
    with pytest.raises(SweepError, match=f"(?s){re.escape(path)}.*{message}"):
        checked_sweep.load(path)


def test_continuous_range_in_a_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"'a' is uniform.*method: random"):
        checked_sweep.load(write(tmp_path, {"a": {"min": 0.0, "max": 1.0}})).cells()


def text_file(folder: Path, parameters: str, method: str = "grid") -> str:
    path = folder / "toy.yaml"
    command = "[python, program.py, '${args}']"
    path.write_text(f"name: toy\nmethod: {method}\nrun_cap: 5\nparameters: {parameters}\ncommand: {command}\n")
    return str(path)


def test_numbers_with_exponents_are_numbers_however_they_are_spelled(tmp_path: Path) -> None:
    sweep = checked_sweep.load(text_file(tmp_path, "{lr: {values: [1e-4, 0.0001, 1.0e-4]}, w: {values: [[1e-3, 2]]}}"))
    cells = sweep.cells()
    assert [cell.parameters for cell in cells] == [{"lr": 0.0001, "w": [0.001, 2]}], "equal values are one cell"
    for text in ("lr=1e-4", "lr=1.0e-4", "lr=0.0001", "lr=.1e-3"):
        assert expansion.select(cells, [text], Path("toy.yaml")) == cells


@pytest.mark.parametrize("kind", ["", ", distribution: log_uniform_values"])
def test_range_whose_ends_have_exponents_is_drawn_from(tmp_path: Path, kind: str) -> None:
    sweep = checked_sweep.load(text_file(tmp_path, f"{{lr: {{min: 1e-5, max: 1e-2{kind}}}}}", "random"))
    assert all(1e-5 <= cell.parameters["lr"] <= 1e-2 for cell in sweep.cells())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{distribution: log_uniform, min: 1e-5, max: 1e-2}", "Did you mean 'log_uniform_values'"),
        ("{distribution: q_log_uniform, min: 1, max: 9, q: 2}", "Did you mean 'q_log_uniform_values'"),
        ("{distribution: choice, values: [1]}", "Did you mean 'categorical'"),
        ("{distribution: log_unifrom, min: 1, max: 9}", "Did you mean 'log_uniform_values'"),
        ("{distribution: unifrom, min: 1, max: 9}", "Did you mean 'uniform'"),
        ("{distribution: [uniform], min: 1, max: 9}", "is unknown"),
        ("{values: [.nan, 1]}", "numbers must be finite"),
        ("{value: {a: [.inf]}}", "numbers must be finite"),
        ("{min: 0, max: .inf}", "numbers must be finite"),
        ("{distribution: log_uniform_values, min: 0, max: 1}", "must be above 0"),
        ("{min: a, max: 1}", "min is 'a', which is not a number"),
    ],
)
def test_wrong_range_names_the_right_one(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        checked_sweep.load(text_file(tmp_path, f"{{lr: {entry}}}", "random"))


def test_unknown_ablation_suggests_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "feature_jitter.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError, match="Did you mean 'feature_jitter'"):
        checked_sweep.load("feature_jiter")


CELLS = [
    Cell({"m.query": query, "m.size": size, "seed_everything": seed})
    for query, size, seed in itertools.product(["none", "first"], [0, 7], [0, 1])
]


@pytest.mark.parametrize(
    ("only", "count"),
    [([], 8), (["query=none"], 4), (["m.query=none", "size=7"], 2), (["size=0", "size=7"], 8), (["size=7.0"], 4)],
)
def test_only_keeps_the_cells_that_fulfil_it(only: list[str], count: int) -> None:
    assert len(expansion.select(CELLS, only, Path("toy.yaml"))) == count


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("query", "form key=value"),
        ("qery=none", "Did you mean 'query'"),
        ("query=non", "has the values none, first"),
    ],
)
def test_only_that_fits_nothing_is_an_error(only: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        expansion.select(CELLS, [only], Path("toy.yaml"))


@pytest.mark.parametrize(("option", "words"), [("--seeds=a,b", "like 0,1,2"), ("--workers=two", "whole number")])
def test_numbers_that_are_none_are_refused_in_plain_words(option, words, capsys):
    with pytest.raises(SystemExit):
        main(["run", "sar", option])
    assert words in capsys.readouterr().err
