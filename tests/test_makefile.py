"""What `make` hands on, it hands on as it was given."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _words(target: str, *variables: str) -> list[list[str]]:
    """The words of each command of a target, not run."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }  # of `make test`
    words = ["make", "--dry-run", target, *variables]
    commands = subprocess.run(words, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in commands.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("target", "variables", "words"),
    [
        ("check-data", ("DATASET=folder", "DATA_ROOT=/my photos", "CATEGORIES=a b,c"), {"/my photos", "a b,c"}),
        (
            "predict",
            ("RUN=my run", "IMAGES=/new photos"),
            {"my run/config.yaml", "--data.init_args.predict_root=/new photos"},
        ),
        ("reconstructions", ("RUN=my run",), {"my run"}),
    ],
)
def test_a_path_with_a_space_stays_one_word(target, variables, words):
    assert words <= set(_words(target, *variables)[-1])
