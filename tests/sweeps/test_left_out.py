"""Cells that lack weights, a package or a file on this machine are left out of a sweep, and the others run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_modules.running import requirements
from lightning_modules.running.methods import import_methods
from lightning_modules.uniad import UniAD
from models import pretrained
from models.backbones import BackboneConfig
from sweeps.runner import checked_sweep, preflight

REPOSITORY = Path(__file__).resolve().parents[2]
VIT = "vit_small_patch14_reg4_dinov2.lvd142m"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without weights and without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(requirements, "cached_file", lambda name: None)
    monkeypatch.delenv("WEIGHTS", raising=False)
    requirements._from_hub.cache_clear()
    yield
    requirements._from_hub.cache_clear()


def config(weights: str, name: str = VIT, **arguments: Any) -> dict[str, Any]:
    backbone = {"name": name, "weights": weights}
    return {"model": {"class_path": "lightning_modules.uniad.UniAD", "init_args": {"backbone": backbone, **arguments}}}


def test_trained_weights_that_are_nowhere_are_named(no_hub: None) -> None:
    reason = requirements.lacking(config("imagenet"))
    assert reason is not None
    assert VIT in reason
    assert requirements.lacking(config("imagenet"), insisted=True) is None


@pytest.mark.parametrize("weights", ["random", "auto"])
def test_weights_that_every_machine_has_are_no_requirement(no_hub: None, weights: str) -> None:
    assert requirements.lacking(config(weights)) is None


def test_weight_file_counts_when_it_exists(tmp_path: Path, no_hub: None) -> None:
    path = tmp_path / "w.pth"
    assert str(path) in (requirements.lacking(config(str(path))) or "")
    path.touch()
    assert requirements.lacking(config(str(path))) is None


def test_weights_in_the_cache_or_from_the_hub_let_a_cell_run(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "cached_file", lambda name: "/cache/model.safetensors")
    assert requirements.lacking(config("imagenet")) is None
    monkeypatch.setattr(requirements, "cached_file", lambda name: None)
    monkeypatch.setattr(requirements, "hub_answers", lambda: True)
    for delivered in (True, False):
        requirements._from_hub.cache_clear()
        monkeypatch.setattr(requirements, "fetch", lambda name, delivered=delivered: delivered)
        assert (requirements.lacking(config("imagenet")) is None) == delivered


def test_fetch_asks_no_network_for_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "cached_file", lambda name: "/cache/model.safetensors")
    monkeypatch.setattr(pretrained, "_download", lambda name, timeout: pytest.fail("a download began"))
    assert pretrained.fetch(VIT)


def test_package_and_file_that_a_method_names_are_asked_for(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UniAD, "needs_packages", {"no_such_package": "make baselines"})
    reason = requirements.lacking(config("random"))
    assert reason == "uniad needs the Python package no_such_package, which is not installed: make baselines."
    monkeypatch.setattr(UniAD, "needs_packages", {"yaml": "make baselines"})
    assert requirements.lacking(config("random")) is None
    monkeypatch.setattr(UniAD, "needs_files", ("teacher",))
    assert "--model.init_args.teacher=<path>" in requirements.lacking(config("random", teacher=None))
    assert "does not exist" in requirements.lacking(config("random", teacher=str(tmp_path / "teacher.pth")))
    assert requirements.lacking(config("random", teacher=str(tmp_path))) is None
    assert "model.init_args.teacher" in requirements.options(UniAD)


def test_a_run_without_a_package_ends_in_the_same_sentence_before_weights_are_looked_for(
    no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UniAD, "needs_packages", {"no_such_package": "make baselines"})
    with pytest.raises(ValueError, match=r"^uniad needs the Python package no_such_package.*: make baselines\.$"):
        UniAD(BackboneConfig(VIT, (1,), weights="/no/such/file"))


@pytest.mark.parametrize("name", ["cflow", "fastflow", "draem", "efficientad"])
def test_methods_through_anomalib_are_left_out_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = import_methods()[name]
    path = f"{method.__module__}.{method.__name__}"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    reason = requirements.lacking({"model": {"class_path": path, "init_args": {}}})
    assert reason == f"{name} needs the Python package anomalib, which is not installed: make baselines."


def test_each_cell_gets_its_own_answer_and_equal_needs_are_looked_up_once(
    no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = checked_sweep.load("vit_backbones")
    asked: list[str] = []
    real = requirements.lacking

    def lacking(config: Any, insisted: bool = False) -> str | None:
        asked.append(config["model"]["init_args"]["backbone"]["name"])
        return real(config, insisted) if "dinov2" in asked[-1] else None

    monkeypatch.setattr(requirements, "lacking", lacking)
    check = preflight.Check.__new__(preflight.Check)
    check._sweep, check._cells, check._variables = sweep, sweep.cells(), {**os.environ, "PROFILE": "demo"}
    reasons = preflight._lacking(check._question())
    names = [cell.parameters["model.init_args.backbone.name"] for cell in sweep.cells()]
    assert [bool(reason) for reason in reasons] == ["dinov2" in name for name in names]
    assert sorted(asked) == sorted(set(names))


def test_profiles_of_the_demo_that_need_something_say_so_and_the_others_need_nothing(
    no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)  # with or without anomalib
    lacking = set()
    for path in Path("sweeps/profiles/demo").glob("*.yaml"):
        if requirements.lacking(yaml.safe_load(path.read_text())):
            lacking.add(path.stem)
    assert lacking == {"dinomaly", "dinomaly2", "inp_former", "cflow", "fastflow", "draem", "efficientad"}


@pytest.mark.program
def test_sweep_whose_weights_are_nowhere_is_left_out_with_the_reason_and_without_an_error(project: Any) -> None:
    shutil.copytree(REPOSITORY / "sweeps" / "profiles", project.folder / "sweeps" / "profiles", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "sweeps" / "dinomaly_components.yaml", project.folder / "sweeps")
    for name in ("bottle_cap", "cable", "circuit_board", "fabric"):
        (project.folder / "data" / "synthetic" / name / "train" / "good").mkdir(parents=True)
    (project.folder / "data" / "synthetic" / "synthetic.json").write_text("{}")
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(project.folder / "hub")}
    code, output = project.run("run", "dinomaly_components", limit=200, **nowhere)
    assert code == 0, output
    assert "left out, 16 of 16 cells" in output
    assert VIT in output
    assert "failed" not in output
    assert not (project.folder / "results" / "runs").exists()


def test_left_out_cells_do_not_hide_a_cell_that_has_its_record() -> None:
    from sweeps.__main__ import _left_out
    from sweeps.runner.expansion import Cell

    cells = [Cell({"a": number}) for number in range(3)]
    jobs = [SimpleNamespace(cell=cell, finished=lambda done=n == 1: done) for n, cell in enumerate(cells)]
    assert _left_out(jobs, cells, ["no weights", "no weights", None]) == {0: "no weights"}
