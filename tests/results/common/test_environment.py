"""What a user types for make arrives as it was typed, and is read in one way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from results.common.environment import data, folders, names

REPOSITORY = Path(__file__).resolve().parents[3]


def test_lists_are_split_and_a_single_folder_is_not():
    assert names(" a, b,,") == ("a", "b")
    assert folders("/x/a, b") == ("/x/a, b",)
    assert folders("/x/a, /y", 2) == ("/x/a", "/y")
    assert folders("~/x") == (os.path.expanduser("~/x"),)
    assert data({"DATASET": "mvtec_ad", "DATA_ROOT": "/d", "CATEGORIES": "a, b"}) == (
        ("mvtec_ad",),
        ("/d",),
        ("a", "b"),
    )


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
