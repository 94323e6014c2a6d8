"""Before the first cell: the embedded benchmark, the decision about weights, the display on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sweeps.runner import prepare
from sweeps.runner.errors import SweepError

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = ("run", "toy", "--no-table")
PROFILE = """
model: {init_args: {backbone: {name: mobilenet, weights: auto}}}
data: {init_args: {datasets: [{name: synthetic, root: data/synthetic}]}}
"""


@pytest.fixture
def prepared(project: Any) -> Any:
    """A project whose profile asks for the embedded benchmark and automatic weights, with quick stand-ins for both."""
    (project.folder / "sweeps" / "profiles" / "demo" / "toy.yaml").write_text(PROFILE)
    for package, module, code in [
        (
            "datamodules",
            "__main__",
            "import pathlib, sys\nroot = pathlib.Path(sys.argv[2])\n(root / 'bolt' / 'train').mkdir(parents=True)\n"
            "(root / '1.png').write_text('x')\n(root / 'synthetic.json').write_text('{}')\n"
            "pathlib.Path('made.txt').open('a').write(f'{sys.argv[1:]}\\n')",
        ),
        (
            "models",
            "backbones",
            "import pathlib, sys\npathlib.Path('decided.txt').open('a').write(f'{sys.argv[1:]}\\n')\n"
            "print('some warning')\nprint(pathlib.Path('answer.txt').read_text())",
        ),
    ]:
        (project.folder / package).mkdir()
        (project.folder / package / "__init__.py").write_text(f"__path__.append({str(REPOSITORY / package)!r})")
        (project.folder / package / f"{module}.py").write_text(code)
    (project.folder / "answer.txt").write_text("random")
    project.sweep({"model.size": [1, 2, 3]})
    return project


def weights(project: Any) -> list[str | None]:
    return [record["environment"]["WEIGHTS"] for record in project.records().values()]


@pytest.mark.program
def test_embedded_benchmark_is_made_once_and_appears_whole(prepared: Any) -> None:
    runners = [prepared.start(*RUN) for _ in range(2)]
    outputs = [runner.communicate(timeout=60)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    assert len((prepared.folder / "made.txt").read_text().splitlines()) == 1
    assert [path.name for path in (prepared.folder / "data").iterdir()] == ["synthetic"]
    assert len(prepared.records()) == 3


@pytest.mark.program
def test_single_training_finds_the_embedded_benchmark_made(prepared: Any) -> None:
    for made in (1, 0):
        process = prepared.start("data", "sweeps/profiles/demo/toy.yaml")
        assert process.communicate(timeout=60)[0].count("Making") == made
        assert process.returncode == 0
    assert (prepared.folder / "data" / "synthetic" / "1.png").is_file()


@pytest.mark.program
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DATASET": "mvtec_add", "DATA_ROOT": "data/nuts"}, "Did you mean 'mvtec_ad' or 'mvtec_ad_2'?"),
        ({"DATASET": "folder", "DATA_ROOT": "data/nust"}, "should be in data/nust, which is not a folder"),
        ({"DATASET": "folder", "DATA_ROOT": "data/nuts", "CATEGORIES": "m8,m10x"}, "Did you mean 'm10'?"),
        ({"DATASET": "folder", "DATA_ROOT": "data/nuts", "CATEGORIES": "m8"}, ""),
    ],
)
def test_misspelt_data_is_refused_before_torch_is_loaded(prepared: Any, variables: dict[str, str], told: str) -> None:
    for category in ("m8", "m10"):
        (prepared.folder / "data" / "nuts" / category / "train").mkdir(parents=True)
    (prepared.folder / "torch.py").write_text("raise SystemExit('torch is loaded')")
    code, output = prepared.run("data", "sweeps/profiles/demo/toy.yaml", **variables)
    assert code == (2 if told else 0), output
    assert told in output


def test_numerical_libraries_share_one_number_of_threads() -> None:
    assert set(prepare.threads({}, 2).values()) == {"2"}
    assert set(prepare.threads({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": ""}, 2).values()) == {"1"}
    assert prepare.threads({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "3"}, 2)["MKL_NUM_THREADS"] == "3"


@pytest.mark.program
def test_weights_are_decided_once_per_sweep_and_random_ones_are_shouted(prepared: Any) -> None:
    _, output = prepared.run(*RUN, "--only", "size=1")
    assert "mobilenet has RANDOM weights" in output
    (prepared.folder / "answer.txt").write_text("imagenet")
    _, output = prepared.run(*RUN)
    assert "RANDOM" in output, "the sweep's other cells must not differ from its first one"
    assert weights(prepared) == ["random"] * 3
    assert (prepared.folder / "decided.txt").read_text() == "['mobilenet', '--weights', 'auto']\n"


def test_own_photographs_are_not_trained_on_random_features_unasked(prepared: Any) -> None:
    (prepared.folder / "data" / "nuts" / "m8" / "train").mkdir(parents=True)
    own = {"DATASET": "folder", "DATA_ROOT": "data/nuts"}
    code, output = prepared.run(*RUN, **own)
    assert code != 0
    assert "WEIGHTS=random insists" in " ".join(output.split())
    assert not prepared.records()
    assert prepared.run(*RUN, WEIGHTS="random", **own)[0] == 0
    assert weights(prepared) == ["random"] * 3


@pytest.mark.program
def test_automatic_weights_may_come_from_a_package(prepared: Any) -> None:
    (prepared.folder / "answer.txt").write_text("packaged")
    _, output = prepared.run(*RUN)
    assert "mobilenet has ImageNet weights, those of a Python package" in output
    assert weights(prepared) == ["packaged"] * 3


@pytest.mark.program
def test_named_weights_are_passed_on_and_make_other_cells(prepared: Any) -> None:
    prepared.run(*RUN, WEIGHTS="imagenet")
    prepared.run(*RUN, WEIGHTS="random")
    assert sorted(weights(prepared)) == ["imagenet"] * 3 + ["random"] * 3
    assert not (prepared.folder / "decided.txt").exists()


@pytest.mark.program
def test_program_that_cannot_decide_the_weights_stops_the_sweep_before_any_cell(prepared: Any) -> None:
    (prepared.folder / "answer.txt").unlink()
    code, output = prepared.run(*RUN)
    assert code == 2
    assert "could not decide the weights of mobilenet" in output
    assert not prepared.starts()


@pytest.mark.program
def test_list_shows_cells_and_what_they_cost(prepared: Any) -> None:
    _, output = prepared.run("list")
    assert "toy" in output
    assert "3" in output
    assert "no run yet" in output
    prepared.run(*RUN)
    _, output = prepared.run("list", "toy")
    assert output.count("done") == 3


def test_environment_drops_empty_variables_that_make_exports() -> None:
    variables = prepare.environment(None, {"DATASET": "", "WANDB": "", "PROFILE": "", "HOME": "/", "EMPTY": ""})
    assert variables == {"HOME": "/", "EMPTY": "", "PROFILE": "demo", "WANDB_MODE": "offline"}
    assert prepare.environment("paper", {"PROFILE": "demo"})["PROFILE"] == "paper"
    assert prepare.environment(None, {"WANDB_MODE": "disabled"})["WANDB_MODE"] == "disabled"
    with pytest.raises(SweepError, match="WANDB is 'yes'"):
        prepare.environment(None, {"WANDB": "yes"})


def test_gpus_are_chosen_by_number_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert prepare.gpus(None) == ["2", "3"]
    assert prepare.gpus("0, 1") == ["0", "1"]
    assert prepare.gpus("none") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert prepare.gpus(None) == []


@pytest.mark.program
def test_terminal_shows_bars_and_metric_while_cells_run(project: Any) -> None:
    project.sweep({"model.size": [1, 2], "model.nap": 0.5})
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps", *RUN],
        cwd=project.folder,
        env={**project.environment, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            try:
                part = os.read(master, 65536)
            except OSError:
                break
            shown += part
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait(timeout=10) == 0
    text = shown.decode(errors="replace")
    assert "epoch 1/3" in text
    assert "train/loss 0.5" in text
    assert "2 of 2 done" in text or text.count("done") >= 2
    assert "time left" in text


def test_tracked_files_of_the_sweeps_are_there_for_every_profile() -> None:
    profiles = {path.name: {file.name for file in path.iterdir()} for path in Path("sweeps/profiles").iterdir()}
    assert profiles["demo"] == profiles["paper"]
