"""Programs started from a warmed process behave like programs, at a fraction of the cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sweeps.runner import warm

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(not warm.AVAILABLE, reason="only Linux lets a process be adopted"),
]
REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = """
import json, os, sys, time
from lightning_modules import VERSION
said = [sys.argv[1:], os.environ.get("MARK"), os.getcwd(), VERSION, __name__, __spec__.name, os.getpgid(0)]
print(json.dumps(said), flush=True)
print("error", file=sys.stderr, flush=True)
if "sleep" in sys.argv:
    time.sleep(60)
sys.exit("refused" if "refuse" in sys.argv else 0)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A stand-in for the training program, in a folder of its own."""
    for name, text in {"__init__": "VERSION = 1", "__main__": MAIN, "running/command_line": ""}.items():
        file = tmp_path / "lightning_modules" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "lightning_modules" / "running" / "__init__.py").write_text("")
    return tmp_path


@pytest.fixture
def starts(root: Path) -> Iterator[warm.WarmStarts]:
    warmed = warm.WarmStarts({**os.environ, "PYTHONPATH": str(REPOSITORY)}, root)
    yield warmed
    warmed.close()


def run(starts: warm.WarmStarts, folder: Path, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """Exit code and lines of one start."""
    with (folder / "log").open("wb") as log:
        pid = starts.start(arguments, {**os.environ, **variables}, log.fileno(), folder=folder)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (folder / "log").read_text().splitlines()


def test_a_start_is_a_program_with_its_own_arguments_variables_folder_output_and_exit_code(starts, tmp_path):
    for mark in ("a", "b"):
        code, (line, error) = run(starts, tmp_path, mark, "ü b", MARK=mark)
        arguments, variable, folder, _, name, spec, group = json.loads(line)
        assert (code, error, arguments, variable, folder) == (0, "error", [mark, "ü b"], mark, str(tmp_path))
        assert (name, spec) == ("__main__", "lightning_modules.__main__"), "what Lightning starts other devices by"
        assert group != os.getpgid(0), "a terminal's Ctrl-C does not reach it"
    assert run(starts, tmp_path, "refuse")[0] == 1
    assert run(starts, tmp_path, "refuse")[1][-1] == "refused"


def test_a_changed_source_file_is_what_the_next_start_runs(starts, root, tmp_path):
    assert json.loads(run(starts, tmp_path)[1][0])[3] == 1
    (root / "lightning_modules" / "__init__.py").write_text("VERSION = 2")
    assert json.loads(run(starts, tmp_path)[1][0])[3] == 2


def test_a_source_file_that_cannot_be_imported_is_an_error_not_a_wait(starts, root, tmp_path, capfd):
    (root / "lightning_modules" / "broken.py").write_text("nonsense =")
    with pytest.raises(ChildProcessError, match="exit code 1"):
        run(starts, tmp_path)
    assert "broken.py" in capfd.readouterr().err


def test_a_program_lives_on_without_the_warmed_process_and_dies_with_the_asker(
    root, tmp_path, alive: Callable, wait_for: Callable
):
    script = f"""
import os, sys
from pathlib import Path
from sweeps.runner.warm import WarmStarts
starts = WarmStarts(os.environ, Path({str(root)!r}))
pid = starts.start(["sleep"], os.environ, 1)
starts.close()
print(pid, flush=True)
sys.stdin.read()
"""
    asker = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(next(line for line in asker.stdout if line.strip().isdecimal()))
    time.sleep(0.2)
    assert alive(pid)
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    wait_for(lambda: not alive(pid))


def test_nothing_that_must_be_each_programs_own_is_imported_before_it(tmp_path):
    """Threads do not survive a fork, CUDA neither, and W&B makes a temporary folder when it is imported."""
    code = """
import os, sys, threading
from sweeps.runner import warm
class Requests:
    pass
warm.socket.recv_fds = lambda *given: (b"", [], 0, None)
warm.os._exit = lambda code: sys.exit(check())
def check():
    import torch
    found = ["wandb" in sys.modules, torch.cuda.is_initialized(), len(os.listdir("/proc/self/task")) > 1]
    return str(found) if any(found) else 0
warm._serve(None)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_the_sweeps_command_is_recognised_with_what_env_does_to_its_variables():
    words = ["/usr/bin/env", "-u", "RANK", "PROFILE=demo", sys.executable, "-m", "lightning_modules", "fit", "--a=b=c"]
    arguments, variables = warm.WarmStarts.own(words, {"RANK": "3", "PROFILE": "paper", "HOME": "/"})
    assert (arguments, variables) == (["fit", "--a=b=c"], {"PROFILE": "demo", "HOME": "/"})
    for other in (["python", "-m", "lightning_modules"], [sys.executable, "program.py"], ["/usr/bin/env", "-u"], []):
        assert warm.WarmStarts.own(other, {}) is None
