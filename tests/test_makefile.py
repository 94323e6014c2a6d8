"""What `make` hands on, it hands on as it was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STRANGE = "/x y/$dollar $(shell date) `date` \"two\" 'one' #7"
PROGRAM = """#!{python} -S
import json, os, sys
names = ("DATASET", "DATA_ROOT", "CATEGORIES", "PROFILE")
with open({log!r}, "a") as log:
    print(json.dumps([sys.argv[1:], [os.environ.get(name, "") for name in names]]), file=log)
"""


def _call(folder: Path, target: str, variables: dict[str, str], from_environment: bool) -> tuple[list[str], list[str]]:
    """Words and environment (DATASET, DATA_ROOT, CATEGORIES, PROFILE) of the last program that a target starts."""
    log, python = folder / "log", folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)
    (folder / "venv" / ".installed").touch()  # newer than requirements.txt: nothing is installed
    # Those of `make test` itself, and what its user has set.
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS"))
        and name not in ("DATASET", "DATA_ROOT", "CATEGORIES", "RUN", "PROFILE", "COMPARE", "SETTING")
    }
    words = ["make", target, f"VENV={folder / 'venv'}"]
    if from_environment:
        plain |= variables
    else:
        words += [f"{name}={value}" for name, value in variables.items()]
    subprocess.run(words, cwd=ROOT, env=plain, capture_output=True, check=True)
    return tuple(json.loads(log.read_text().splitlines()[-1]))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("from_environment", [False, True])
@pytest.mark.parametrize(
    ("target", "variables", "words", "named"),
    [
        ("check-data", {"DATASET": "folder", "DATA_ROOT": STRANGE, "OUT": STRANGE}, {"--out", STRANGE}, ["folder", STRANGE, ""]),
        ("data", {"DATASET": "visa", "DATA_ROOT": STRANGE, "ADDRESS": STRANGE}, {"fetch", STRANGE}, ["visa", STRANGE, ""]),
        ("train", {"DATASET": "folder", "DATA_ROOT": STRANGE, "CATEGORIES": "a b, c"}, {"fit"}, ["folder", STRANGE, "a b, c"]),
        ("train", {"RUN": STRANGE}, {f"--run.name={STRANGE}"}, ["", "", ""]),
        (
            "predict",
            {"RUN": STRANGE, "IMAGES": STRANGE},
            {f"--run={STRANGE}", f"--images={STRANGE}"},
            ["", "", ""],
        ),
        (
            "predict",
            {"RUN": "mine", "IMAGES": "a", "OUT": STRANGE, "CATEGORY": STRANGE},
            {f"--out={STRANGE}", f"--category={STRANGE}"},
            ["", "", ""],
        ),
        ("submission", {"RUN": STRANGE, "OUT": "b c"}, {STRANGE, "b c"}, ["", "", ""]),
        ("reconstructions", {"RUN": STRANGE}, {STRANGE}, ["", "", ""]),
        ("compare", {"A": STRANGE, "B": "b c"}, {STRANGE, "b c"}, ["", "", ""]),
        ("table", {"TABLE": STRANGE, "SOURCE": "runs"}, {STRANGE, "--source", "runs"}, ["", "", ""]),
    ],
)  # fmt: skip
def test_names_of_files_arrive_letter_for_letter(tmp_path, target, variables, words, named, from_environment):
    found, environment = _call(tmp_path, target, variables, from_environment)
    assert words <= set(found)
    assert environment == [*named, "demo"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_table_leaves_the_choice_of_numbers_to_the_program(tmp_path):
    found, _ = _call(tmp_path, "table", {"TABLE": "unias_4"}, from_environment=True)
    assert not {"--source", "--profile", "--setting", "--compare"} & set(found)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("from_environment", [False, True])
def test_the_profile_is_demo_for_trainings_paper_for_checkpoints_and_any_for_tables(tmp_path, from_environment):
    def profile(target: str, **given: str) -> tuple[list[str], str]:
        words, environment = _call(tmp_path / f"{target}{len(given)}", target, given, from_environment)
        return words, environment[-1]

    assert profile("import", CHECKPOINT="a.pth")[1] == "paper"
    assert profile("import", CHECKPOINT="a.pth", PROFILE="demo")[1] == "demo"
    words, name = profile("train", METHOD="rlr")
    assert (words[-1], name) == ("sweeps/profiles/demo/rlr.yaml", "demo")
    words, _ = profile("tables", PROFILE="paper", SETTING="unified", COMPARE="matched")
    assert words[-6:] == ["--profile", "paper", "--compare", "matched", "--setting", "unified"]
