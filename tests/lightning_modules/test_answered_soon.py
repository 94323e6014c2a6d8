"""A mistake on the command line is answered before the libraries are imported that only a training needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.program

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("timm", "wandb", "scipy.signal", "albumentations", "torchvision.transforms")
SCRIPT = """
import contextlib, io, json, sys
import lightning.pytorch.cli
lightnings = set(sys.modules)
from lightning_modules.running.command_line import main
answers = []
for words in json.loads(sys.argv[1]):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main(words)
    except SystemExit as leaving:
        printed.write(str(leaving.code))
    answers.append([printed.getvalue(), [name for name in json.loads(sys.argv[2]) if name in set(sys.modules) - lightnings]])
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the program says, and which heavy libraries it has imported until then, by case."""
    results = tmp_path_factory.mktemp("results")
    (results / "runs" / "single" / "mine").mkdir(parents=True)
    fit = ["fit", "--config", "sweeps/profiles/demo/uniad.yaml"]
    cases = {
        "help": ["--help"],
        "help of fit": ["fit", "--help"],
        "model": [*fit, "--model.init_args.d_modell=3"],
        "data": [*fit, "--data.init_args.batchsize=3"],
        "abbreviated": [*fit, "--trainer.max_epoch=3"],
        "existing run": [*fit, f"--run.results={results}", "--run.name=mine"],
    }
    words = [sys.executable, "-c", SCRIPT, json.dumps(list(cases.values())), json.dumps(HEAVY)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr
    return dict(zip(cases, json.loads(lines[0].removeprefix("ANSWERS")), strict=True))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("help", "usage: python -m lightning_modules"),
        ("help of fit", "--run.name"),
        ("model", "d_model"),
        ("data", "batch_size"),
        ("abbreviated", "trainer.max_epochs"),
        ("existing run", "is already a finished run: choose another --run.name"),
    ],
)
def test_the_answer_is_right_and_needs_no_library_of_a_training(answers, case, said):
    text, imported = answers[case]
    assert said in text
    assert not imported


def test_a_first_line_appears_before_the_imports():
    program = [sys.executable, "-m", "lightning_modules", "--help"]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr.readline() == "UniRecon is loading PyTorch and Lightning.\n"
        finally:
            running.kill()
