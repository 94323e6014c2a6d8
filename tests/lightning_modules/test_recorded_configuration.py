"""What arrives from others, a record or a checkpoint, is data: nothing in it runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.pictures.reconstructions import trained as trained_run
from lightning_modules.running import checkpoints, recorded_configuration
from lightning_modules.running.command_line import main
from lightning_modules.running.methods import import_methods

TRAP = """
import pathlib
pathlib.Path(__file__).with_name("ran").write_text("")
import lightning as L
from lightning_modules.uniad import UniAD
class Trap(L.Callback):
    pass
class Method(UniAD):
    pass
"""


@pytest.fixture
def record(trained, tmp_path) -> Path:
    """A copy of a finished run's record and work, as if fetched, with a module beside the configuration."""
    shutil.copytree(trained.results, tmp_path / "results")
    folder = tmp_path / "results" / "runs" / "single" / "first"
    (folder / "trap.py").write_text(TRAP)
    return folder


def _edit(folder: Path, *keys: str, value: object) -> None:
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(yaml.safe_dump(content))


def _predict(folder: Path, images: Path, *more: str) -> None:
    main(["predict", f"--config={folder / 'config.yaml'}", f"--data.init_args.predict_root={images}", *more])


def test_the_trainer_of_a_foreign_record_is_not_obeyed(record, data_root, monkeypatch):
    monkeypatch.chdir(record)
    monkeypatch.syspath_prepend("")
    for name, value in (
        ("callbacks", [{"class_path": "trap.Trap"}]),
        ("plugins", [{"class_path": "trap.Trap"}]),
        ("logger", {"class_path": "trap.Trap"}),
        ("profiler", {"class_path": "trap.Trap"}),
        ("strategy", "trap.Trap"),
        ("default_root_dir", "/nowhere"),
    ):
        _edit(record, "trainer", name, value=value)
    _predict(record, data_root / "disc" / "test")
    assert not (record / "ran").exists()
    assert (record.parents[2] / "work" / "single" / "first" / "predictions" / "scores.csv").is_file()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "class_path"), "trap.Method"),
        (("data", "class_path"), "trap.Method"),
        (("model",), "trap.Method"),
        (("model", "init_args", "optimizer"), "trap.Method"),
        (("model", "init_args", "optimizer"), "os.system"),
        (("model", "init_args", "optimizer", "class_path"), "torch.optim.optimizer.warnings.warn"),
        (("model", "init_args", "lr_scheduler"), {"class_path": "trap.Method"}),
        (("model", "init_args", "head"), {"class_path": "trap.Method"}),
        (("model", "init_args", "lr_scheduler"), "lightning.pytorch.cli.LightningCLI"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "reconstructions"])
def test_a_foreign_record_builds_no_class_but_the_projects_own(record, data_root, monkeypatch, command, keys, value):
    monkeypatch.chdir(record)
    monkeypatch.syspath_prepend("")
    _edit(record, *keys, value=value)
    if command == "predict":
        with pytest.raises(SystemExit, match=r"names the class|are a class_path"):
            _predict(record, data_root)
    else:
        (record / "trap.py").unlink()
        with pytest.raises(ValueError, match=r"names the class|are a class_path|checksum|changed|differs"):
            trained_run(record)
    assert not (record / "ran").exists()


def test_places_that_a_foreign_record_names_are_not_used(record, data_root, tmp_path):
    for key in ("run", "cache"):
        _edit(record, key, {"run": "results", "cache": "root"}[key], value=str(tmp_path / "elsewhere"))
    _predict(record, data_root / "disc" / "test")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "&a [*a]", "[" * 5000, "- !!python/object/apply:os.system ['true']"]
)
def test_what_is_no_configuration_is_refused_in_a_sentence(record, data_root, text):
    (record / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=r"^error: .*config\.yaml"):
        _predict(record, data_root)


def test_every_configuration_of_the_project_is_one_that_a_record_may_have():
    methods = import_methods().values()
    for file in sorted(Path("sweeps/profiles").glob("*/*.yaml")):
        content = yaml.safe_load(file.read_text())
        for key in ("model", "data"):
            if "class_path" in content.get(key, {}):
                recorded_configuration.check(content[key], file, methods)


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("how", ["fit", "predict", "reconstructions", "ckpt_path"])
def test_pickle_in_a_checkpoint_is_not_run(record, data_root, project, tmp_path, monkeypatch, how):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    last = record.parents[2] / "work" / "single" / "first" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "more": _Trap()}, last)
    last.with_name(checkpoints.PREVIOUS).unlink(missing_ok=True)
    (record / "trap.py").unlink()
    if how == "fit":
        project.checkpoint("other").parent.mkdir(parents=True)
        shutil.copy(last, project.checkpoint("other"))
    started = {
        "fit": lambda: project.run(name="other"),
        "ckpt_path": lambda: project.run(f"--ckpt_path={last}", name="other"),
        "predict": lambda: _predict(record, data_root),
        "reconstructions": lambda: trained_run(record),
    }
    with pytest.raises((SystemExit, ValueError), match="classes beyond tensors"):
        started[how]()
    assert not Path("ran").exists()
