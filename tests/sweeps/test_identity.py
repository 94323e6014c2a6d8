"""Cell ids: the same cell has the same name everywhere, and whatever changes the result changes the name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from results.common import deciding
from results.common.code import code_hash, reached_files, unchanged_since
from sweeps.runner import checked_sweep, command, identity, prepare
from sweeps.runner.errors import SweepError
from sweeps.runner.expansion import Cell
from sweeps.runner.identity import Dataset, Identifier

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project: program -> base -> metrics; two methods; data; a sweep."""
    files = {
        "train/__init__.py": "",
        "train/__main__.py": "from train import base",
        "train/base.py": "from .metrics import auroc\nimport results.aggregator.records",
        "train/metrics.py": '"""Metrics."""\n\n\ndef auroc():\n    """Area."""\n    return 1  # one\n\n\n'
        'def f():\n    raise OSError("not there")\n',
        "train/uniad.py": "def f():\n    from nets.uniad import net",
        "train/rlr.py": "import nets.rlr",
        "nets/__init__.py": "",
        "nets/uniad.py": "x = 1",
        "nets/rlr.py": "x = 1",
        "results/__init__.py": "",
        "results/aggregator/records.py": "x = 1",
        "data/a/good/1.png": "pixels",
        "data/a/good/2.bmp": "pixels",
        "data/a/truth/2.tiff": "mask",
        "data/b/good/1.png": "pixels",
        "profiles/demo.yaml": "model: {class_path: train.uniad.UniAD}\ncache: {root: results/cache}\nrun: {heatmaps: true}\n"
        "data: {init_args: {num_workers: 1, predict_root: null}}\n",
        "sweeps/toy.yaml": yaml.safe_dump(
            {
                "name": "toy",
                "method": "grid",
                "parameters": {"size": {"values": [1, 2]}, "seed_everything": {"values": [0]}},
                "command": [
                    "${interpreter}", "-m", "train", "fit", "--config", "profiles/${envvar:PROFILE}.yaml",
                    "--run.sweep=toy", "--epochs=3", "${args}",
                ],
            }
        ),
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name(
    cell: int = 0, weights: str | None = None, seeds: list[int] | None = None, root: str = "data", **variables: str
) -> str:
    sweep = checked_sweep.load("toy")
    dataset = Dataset("folder", Path(root), ("a",))
    return Identifier(sweep, {"PROFILE": "demo", **variables}, [dataset]).name(sweep.cells(seeds)[cell], weights)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_name_is_the_same_in_another_process_folder_and_order(repository: Path) -> None:
    before = name()
    assert len(before) == 12
    moved = repository.parent / f"{repository.name} moved"
    shutil.copytree(repository, moved)
    edit(moved / "profiles" / "demo.yaml", "model:", "# a comment\nseed_everything: 3\nmodel:")
    edit(repository / "profiles" / "demo.yaml", "cache:", "seed_everything: 3\ncache:")
    assert name() != before
    program = """
import os, sys
sys.path.insert(0, os.environ["PYTHONPATH"])
os.scandir = (lambda scan: lambda place: Reversed(scan(place)))(os.scandir)
class Reversed:
    def __init__(self, found): self.found = found
    def __enter__(self): return self
    def __exit__(self, *error): self.found.close()
    def __iter__(self): return iter(list(self.found)[::-1])
from pathlib import Path
from sweeps.runner import checked_sweep
from sweeps.runner.identity import Dataset, Identifier
sweep = checked_sweep.load("toy")
print(Identifier(sweep, {"PROFILE": "demo"}, [Dataset("folder", Path("data"), ("a",))]).name(sweep.cells()[0], None))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=moved, env=environment, capture_output=True, text=True
    )
    assert printed.stdout.strip() == name(), printed.stderr


def test_everything_that_determines_the_result_changes_the_name(repository: Path) -> None:
    base = name()
    weights = repository / "weights.pth"
    weights.write_bytes(b"one")
    others = [
        name(cell=1),
        name(seeds=[1]),
        name(weights="random"),
        name(weights="imagenet"),
        name(weights="weights.pth"),
        name(DATASET="btad"),
        name(CATEGORIES="a"),
        name(BACKBONE="resnet18"),
    ]
    for path, old, new in [
        ("profiles/demo.yaml", "train.uniad.UniAD", "train.uniad.Other"),
        ("sweeps/toy.yaml", "--epochs=3", "--epochs=4"),
        ("nets/uniad.py", "x = 1", "x = 2"),
        ("train/metrics.py", "return 1", "return 2"),
        ("data/a/good/1.png", "pixels", "more pixels"),
        ("data/a/good/1.png", "more pixels", "less pixels"),
        ("data/a/good/2.bmp", "pixels", "slexip"),
        ("data/a/truth/2.tiff", "mask", "ksam"),
    ]:
        edit(repository / path, old, new)
        others.append(name())
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("nets/rlr.py", "x = 1", "x = 2"),
        ("train/rlr.py", "import nets.rlr", "x = 1"),
        ("results/aggregator/records.py", "x = 1", "x = 2"),
        ("train/metrics.py", "  # one", "  # the whole"),
        ("train/metrics.py", "Area.", "Area under the curve."),
        ("train/metrics.py", "not there", "missing"),
        ("data/b/good/1.png", "pixels", "more pixels"),
        ("profiles/demo.yaml", "root: results/cache", "root: /scratch/cache"),
        ("profiles/demo.yaml", "num_workers: 1", "num_workers: 4"),
        ("profiles/demo.yaml", "heatmaps: true", "heatmaps: false"),
        ("profiles/demo.yaml", "predict_root: null", "predict_root: photos"),
    ],
)
def test_finished_cells_survive_an_edit_that_cannot_change_them(
    repository: Path, path: str, old: str, new: str
) -> None:
    before = name()
    edit(repository / path, old, new)
    assert name() == before


def test_place_of_weights_and_data_does_not_matter(repository: Path) -> None:
    for folder in ("one", "two"):
        (repository / folder).mkdir()
        (repository / folder / "weights.pth").write_bytes(b"the same")
    assert name(weights="one/weights.pth") == name(weights="two/weights.pth")
    before = name()
    (repository / "data").rename(repository / "elsewhere")
    assert name(root="elsewhere") == before


def test_files_are_those_of_a_commit_until_one_of_them_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("decides.py", "shows.py"):
        (tmp_path / name).write_text("1\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "1")):
        subprocess.run(["git", *words], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    (tmp_path / "shows.py").write_text("2\n")
    assert unchanged_since(commit, ["decides.py"])
    assert not unchanged_since(commit, ["decides.py", "shows.py"])
    assert not unchanged_since(commit, ["decides.py", "new.py"])
    (tmp_path / "new.py").write_text("1\n")
    assert not unchanged_since(commit, ["decides.py", "new.py"]), "it is not the commit's"
    assert not unchanged_since(commit, [])
    for unknown in ("unknown", "c0ffee" * 6, None, "--cached"):
        assert not unchanged_since(unknown, ["decides.py"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not unchanged_since(commit, ["decides.py"])


def test_code_of_this_repository_is_found_from_its_program() -> None:
    reached = {str(path.relative_to(REPOSITORY)) for path in reached_files(["lightning_modules.__main__"], REPOSITORY)}
    assert {
        "lightning_modules/base.py",
        "models/head.py",
        "datamodules/images.py",
        "datamodules/cache/entry.py",
    } <= reached
    assert reached_files(["sweeps.__main__"], REPOSITORY) == set(), "the runner itself determines no result"
    assert code_hash(["datamodules"], REPOSITORY) != code_hash(["models"], REPOSITORY)


def test_what_only_shows_is_there_and_renames_no_cell() -> None:
    for listed in deciding.SHOWING:
        assert (REPOSITORY / listed).exists(), f"{listed} is listed, but is not there"
    reached = {str(path.relative_to(REPOSITORY)) for path in reached_files(["lightning_modules.__main__"], REPOSITORY)}
    assert not any(deciding.shows_only(path) for path in reached)
    assert "lightning_modules/pictures/heatmaps.py" not in reached


def test_modules_looked_up_by_name_count(repository: Path) -> None:
    (repository / "nets" / "__init__.py").write_text(
        "from importlib import import_module\nimport_module('nets.hidden')"
    )
    (repository / "nets" / "hidden.py").write_text("x = 1")
    before = name()
    edit(repository / "nets" / "hidden.py", "x = 1", "x = 2")
    assert name() != before


@pytest.mark.parametrize(
    ("ablation", "needed", "strange"),
    [("uniad_components", "lightning_modules/uniad.py", "lightning_modules/rlr.py")],
)
def test_shipped_sweep_depends_on_its_own_method_the_data_and_the_metrics(
    ablation: str, needed: str, strange: str
) -> None:
    root = REPOSITORY
    roots = identity.code_roots(checked_sweep.load(ablation), {"PROFILE": "demo"})
    reached = {str(path.relative_to(root)) for path in reached_files(roots, root)}
    assert {
        needed,
        "lightning_modules/running/command_line.py",
        "lightning_modules/base.py",
        "models/uniad.py",
    } <= reached
    assert {"datamodules/unified.py", "datamodules/readers/base.py", "models/backbones.py"} <= reached
    assert any(path.startswith("lightning_modules/metrics/") for path in reached)
    assert strange not in reached, "another method's edit must not start this sweep again"
    assert not any(path.startswith(("results/", "sweeps/", "tests/")) for path in reached)


def test_environment_names_the_data_before_the_profile_does(repository: Path) -> None:
    edit(
        repository / "profiles" / "demo.yaml",
        "predict_root: null",
        "datasets: [{name: mvtec, root: data/mvtec, categories: [cable]}]",
    )
    sweep = checked_sweep.load("toy")

    def named(**variables: str) -> list[Dataset]:
        return prepare.datasets(command.configs(sweep.command, {"PROFILE": "demo"}), {"PROFILE": "demo", **variables})

    assert named() == [Dataset("mvtec", Path("data/mvtec"), ("cable",))]
    assert named(DATASET="btad", DATA_ROOT="/b", CATEGORIES="01, 02") == [Dataset("btad", Path("/b"), ("01", "02"))]
    assert named(DATASET="a,b", DATA_ROOT="/a,/b") == [Dataset("a", Path("/a"), None), Dataset("b", Path("/b"), None)]
    (photos,) = named(DATASET="photos")
    assert (photos.root / "cookie").is_dir(), "they come with the project"
    for wrong in ({"DATASET": "btad"}, {"DATA_ROOT": "/b"}, {"CATEGORIES": "01"}):
        with pytest.raises(SweepError, match="DATASET"):
            named(**wrong)


def test_cells_of_one_grid_have_different_names(repository: Path) -> None:
    sweep = checked_sweep.load("toy")
    identifier = Identifier(sweep, {"PROFILE": "demo"}, [])
    cells = [Cell({"size": size, "seed_everything": seed}) for size in range(20) for seed in range(20)]
    assert len({identifier.name(cell, None) for cell in cells}) == 400


def test_a_method_without_profile_is_answered_with_the_nearest_one(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "uniad.yaml").write_text("{}")
    with pytest.raises(SweepError, match=r"No configuration .*uniat\.yaml\. Did you mean 'uniad'\?"):
        identity.read_config(tmp_path / "demo" / "uniat.yaml")


def test_the_version_of_a_package_counts_where_the_method_takes_its_network_from_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"anomalib": "2.7.0"}
    monkeypatch.setattr(identity, "_version", versions.__getitem__)
    before = name()
    (repository / "nets" / "uniad.py").write_text("def net():\n    from anomalib.models import x\n    return x")
    taken = name()
    versions["anomalib"] = "2.7.1"
    assert len({before, taken, name()}) == 3
    (repository / "nets" / "uniad.py").write_text("x = 1")
    (repository / "nets" / "rlr.py").write_text("from anomalib.models import x")  # another method's
    assert name() == before
