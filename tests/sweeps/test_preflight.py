"""Every sweep is accepted by the training program's own parser, and mistakes are named before a cell runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.__main__ import main
from sweeps.runner import checked_sweep, preflight, prepare, program
from sweeps.runner.checked_sweep import CheckedSweep

PROFILES = sorted(path.name for path in Path("sweeps/profiles").iterdir() if path.is_dir())


class OneParser(program.Parser):
    """Built once, and asked once for the same arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._accepted: dict[tuple[str, ...], Mapping[str, Any]] = {}

    def parse(self, arguments: list[str]) -> Mapping[str, Any]:
        key = tuple(arguments)
        if key not in self._accepted:
            self._accepted[key] = super().parse(arguments)
        return self._accepted[key]


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        parser = OneParser()
        patch.setattr(program, "Parser", lambda: parser)
        yield


def problem(sweep: CheckedSweep, profile: str = "demo", cells: slice = slice(None)) -> str | None:
    """What the runner would say about a sweep before its first cell, asked in this process."""
    check = preflight.Check.__new__(preflight.Check)
    check._sweep, check._cells, check._variables = sweep, sweep.cells()[cells], {**os.environ, "PROFILE": profile}
    found = preflight._answer(check._question())
    return None if found is None else check._explain(found)


@pytest.mark.program  # of the shipped files, which `make sweep` asks again before it runs one
@pytest.mark.parametrize("name", checked_sweep.names())
def test_every_value_of_every_sweep_is_accepted_by_the_program(name: str) -> None:
    assert problem(checked_sweep.load(name)) is None


@pytest.mark.program
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", checked_sweep.names())
def test_every_sweep_runs_with_every_profile(name: str, profile: str) -> None:
    assert problem(checked_sweep.load(name), profile, slice(1)) is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model.init_args.neighbour_size": 7}, "_args.neighbour_size' is not an option .*'model.init_args.neighbor_size'"),
        ({"trainer.max_epoch": 7}, "'trainer.max_epoch' is not an option .*Did you mean 'trainer.max_epochs'"),
        ({"model.init_args.backbone.nam": "x"}, "_args.backbone.nam' is not an option .*'model.init_args.backbone.name'"),
        ({"run.protcol": "clean"}, "'run.protcol' is not an option .*Did you mean 'run.protocol'"),
        ({"model.init_args.query": "nonne"}, "value nonne of parameter 'model.init_args.query' .*'none', 'first'"),
        ({"model.init_args.decoder_layers": [4, "four"]}, "value four of parameter 'model.init_args.decoder_layers'"),
        ({"model.init_args.query": ["none", "nonne", "first"]}, "value nonne of parameter 'model.init_args.query' "),
        ({"model.init_args": [{"query": 4}, {"query": "none"}]}, "value {'query': 4} of parameter 'model.init_args' "),
        ({"data.init_args.test_subset": ["full", "some"]}, "value some of parameter 'data.init_args.test_subset' "),
    ],
)  # fmt: skip
def test_mistake_is_named_with_file_key_and_nearest_key(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    content = yaml.safe_load(Path("sweeps/uniad_components.yaml").read_text())
    content["parameters"] = {
        key: {"values": value if isinstance(value, list) else [value]} for key, value in parameters.items()
    }
    path = tmp_path / "uniad_components.yaml"
    path.write_text(yaml.safe_dump(content))
    found = problem(checked_sweep.load(str(path)))
    assert found is not None
    assert found.startswith(str(path))
    assert re.search(message, found, re.DOTALL), found


def test_cells_that_have_every_value_together_are_asked_for_first_and_stand_for_all(monkeypatch) -> None:
    asked = []
    parse = program.Parser().parse
    monkeypatch.setattr(program.Parser(), "parse", lambda words: (asked.append(words), parse(words))[1])
    sweep = checked_sweep.load("uniad_components")
    assert problem(sweep) is None
    values = {(key, str(value)) for cell in sweep.cells() for key, value in cell.parameters.items()}
    assert all(any(f"--{key}={value}" in words for words in asked) for key, value in values)
    assert len(asked) < len(values)


@pytest.mark.parametrize(
    ("values", "commands"),
    [
        ([{"query": "none", "decoder_layers": 2}, {"query": "first", "decoder_layers": 4}], 1),
        ([{"query": "none", "decoder_layers": 2}, {"query": "first"}], 2),  # the first one's layers would stay
        ([{"image_size": 64}, {"image_size": 96}], 2),  # which must go with the data's
        ([{"backbone": {"levels": [1]}}, {"backbone": {"weights": "random"}}], 2),
    ],
)
def test_values_that_would_leave_something_of_each_other_have_a_command_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], commands: int
) -> None:
    content = yaml.safe_load(Path("sweeps/uniad_components.yaml").read_text())
    content["parameters"] = {"model.init_args": {"values": values}}
    path = tmp_path / "uniad_components.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    asked = []
    monkeypatch.setattr(program.Parser(), "parse", asked.append)
    assert problem(checked_sweep.load(str(path))) is None
    assert len(asked) == commands
    assert all(words[-1] == f"--model.init_args={value}" for words, value in zip(asked, values, strict=False))


def test_mistake_in_the_profile_is_named_with_the_profile(tmp_path: Path) -> None:
    profile = tmp_path / "broken.yaml"
    profile.write_text(Path("sweeps/profiles/demo/uniad.yaml").read_text().replace("backbone:", "backbones:"))
    content = yaml.safe_load(Path("sweeps/uniad_components.yaml").read_text())
    content["command"] = [
        word.replace("sweeps/profiles/${envvar:PROFILE}/uniad.yaml", str(profile)) for word in content["command"]
    ]
    path = tmp_path / "uniad_components.yaml"
    path.write_text(yaml.safe_dump(content))
    found = problem(checked_sweep.load(str(path)))
    assert found is not None
    assert str(profile) in found
    assert "backbones" in found


def test_ctrl_c_before_the_first_cell_is_a_sentence(monkeypatch, capsys) -> None:
    def interrupted(profile: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "environment", interrupted)
    assert main(["run", "shots"]) == 130
    assert capsys.readouterr().err == "Interrupted. The same command goes on from here.\n"
