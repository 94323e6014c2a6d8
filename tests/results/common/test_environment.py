"""What a user names in the environment is read in one way by every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from results.common import environment
from results.common.environment import NamedDataset, parse, parts

REPOSITORY = Path(__file__).resolve().parents[3]


def _parse(**variables):
    return parse(variables, {"photos", "toys"}.__contains__).datasets


def _roots(**variables):
    return [(dataset.name, dataset.root) for dataset in _parse(**variables)]


@pytest.mark.parametrize("text", ["a,b", "a, b", " a ,b ", ",a,,b,"])
def test_white_space_and_empty_parts_are_dropped(text):
    assert parts(text) == ("a", "b")
    (dataset,) = _parse(DATASET="mvtec_ad", DATA_ROOT="/d", CATEGORIES=text)
    assert dataset == NamedDataset("mvtec_ad", "/d", ("a", "b"))


def test_values_are_not_interpreted():
    assert _roots(DATASET="folder", DATA_ROOT="/x/$dollar 'it`s'\"") == [("folder", "/x/$dollar 'it`s'\"")]


def test_home_is_expanded_in_every_root(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    # A shell expands the first at most.
    assert _roots(DATASET="btad,visa", DATA_ROOT="~/b, ~/v") == [("btad", "/home/ann/b"), ("visa", "/home/ann/v")]


@pytest.mark.parametrize("root", ["", ",", " ", "/mine"])
def test_a_dataset_of_the_project_needs_no_root(root):
    assert _roots(DATASET="photos", DATA_ROOT=root) == [("photos", root.strip(" ,"))]
    assert _roots(DATASET="photos") == [("photos", "")]


@pytest.mark.parametrize("root", [",/m", "/m", " , /m"])
def test_a_dataset_of_the_project_leaves_the_root_to_its_neighbour(root):
    assert _roots(DATASET="photos,mvtec_ad", DATA_ROOT=root) == [("photos", ""), ("mvtec_ad", "/m")]


def test_places_in_the_list_count_where_they_fit():
    assert _roots(DATASET="photos,toys", DATA_ROOT=",/t") == [("photos", ""), ("toys", "/t")]


def test_datasets_of_one_reader_are_called_after_their_folders():
    found = _parse(DATASET="folder,folder,visa", DATA_ROOT="/a/spring,/a/autumn/,/v")
    assert [dataset.label for dataset in found] == ["spring", "autumn", None]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATASET": "mvtec_ad"}, r"DATASET names 1 dataset\(s\) \(mvtec_ad\) but DATA_ROOT 0 folder"),
        ({"DATA_ROOT": "/a"}, r"DATASET names 0 dataset\(s\) \(none\) but DATA_ROOT 1 folder\(s\) \(/a\)"),
        ({"DATASET": "photos,a,b", "DATA_ROOT": "/a"}, "DATASET names 3"),
        ({"DATASET": "photos", "DATA_ROOT": "/a,/b"}, "DATA_ROOT 2 folder"),
        ({"DATASET": "photos,toys", "CATEGORIES": "x"}, "needs exactly one DATASET; found 2"),
        ({"CATEGORIES": "x"}, "needs exactly one DATASET; found 0"),
    ],
)
def test_contradicting_variables_are_refused_with_what_was_found(variables, message):
    with pytest.raises(ValueError, match=message):
        _parse(**variables)


def test_nothing_named_is_nothing_read():
    assert parse({"DATASET": "", "WEIGHTS": " imagenet "}, lambda name: False).weights == "imagenet"
    assert _parse(DATASET="", DATA_ROOT=" ", CATEGORIES=",") == ()


def test_reading_the_environment_loads_no_torch():
    code = "import sys, results.common.environment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("given", ["as a word of make", "from the environment"])
@pytest.mark.parametrize("root", ["/x/$dollar", "/x/it's", '/x/a"b', "/x/`id`", "/x/a b", "/x/$(shell id)", "/x/#1"])
def test_folders_reach_python_through_make_letter_for_letter(tmp_path, root, given):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import os; print(os.environ[\"DATA_ROOT\"])'\n")
    python.chmod(0o755)
    words = ["make", "-s", "-o", "setup", "check-data", f"VENV={tmp_path}", f"PY={python}"]
    variables = dict(os.environ)
    if given == "from the environment":
        variables["DATA_ROOT"] = root
    else:
        words.append(f"DATA_ROOT={root}")
    outcome = subprocess.run(words, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    assert outcome.stdout.splitlines()[-1:] == [root], outcome.stderr


def test_an_environment_that_was_cut_off_half_made_is_made_anew(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
    (venv / "bin" / "python").chmod(0o755)
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    words = ["make", "-s", "setup", f"VENV={venv}", f"PYTHON={python}"]
    subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert f"-m venv --clear {venv}" in (tmp_path / "calls").read_text()


def test_a_recorded_command_names_every_variable_that_is_read():
    read = set()

    class Watched(dict):
        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)

    environment.parse(Watched(), lambda name: False)
    assert read <= set(environment.VARIABLES)
    line = environment.shell_line(["python"], {"ALPHA": "0.1", "RULE": "max", "DATA_ROOT": "/a b"})
    assert line == "DATA_ROOT='/a b' ALPHA=0.1 RULE=max python"
