"""A dataset of a few small photographs on disk, and UniAD small enough to train in a second."""

from __future__ import annotations

import copy
import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from lightning_modules.callbacks.epoch_seed import EpochSeed
from lightning_modules.running.command_line import main
from models import backbones
from models.weight_files import state_sha256
from results.aggregator.records import StoredRecord, read_record

SIDE = 72  # not the size of the run, so that resizing takes part
CATEGORIES = ("bolt", "disc")
# Where a conftest imports Lightning, its logger does not propagate, and caplog would not see it before pytest 9.2.
logging.getLogger("lightning.pytorch").propagate = True


def _part(category: str, rng: np.random.Generator) -> np.ndarray:
    """A bright bar or disc, a little moved, on a dark noisy ground: uint8 (SIDE, SIDE, 3)."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE // 2 + rng.integers(-4, 5, 2))[:, None, None]
    inside = (abs(rows) < 24) & (abs(columns) < 9) if category == "bolt" else rows**2 + columns**2 < 24**2
    grey = np.where(inside, 190, 60) + rng.normal(0, 6, (SIDE, SIDE))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture(autouse=True)
def no_wandb_run_is_left_open() -> Iterator[None]:
    """The next test's logger would go on with it."""
    yield
    if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def write_dataset(root: Path, masks: bool = True, train: int = 6) -> Path:
    """Two categories in the layout of MVTec AD: per category `train` normal, 2 normal and 3 scratched test images."""
    for number, category in enumerate(CATEGORIES):
        rng = np.random.default_rng(number)
        for split, count in (("train", train), ("test", 2)):
            for k in range(count):
                _save(root / category / split / "good" / f"{k:03d}.png", _part(category, rng))
        for k in range(3):
            image, mask = _part(category, rng), np.zeros((SIDE, SIDE), np.uint8)
            top, left = rng.integers(20, 40, 2)
            mask[top : top + 6, left : left + 14] = 255
            image[mask > 0] = 250 - image[mask > 0]
            _save(root / category / "test" / "scratch" / f"{k:03d}.png", image)
            if masks:
                _save(root / category / "ground_truth" / "scratch" / f"{k:03d}_mask.png", mask)
    return root


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


class Project:
    """The command line in a folder of its own, with a configuration of tiny UniAD on a dataset."""

    def __init__(self, folder: Path, data: Path, reader: str = "mvtec_ad") -> None:
        self.folder, self.data = folder, data
        self.results = folder / "results"
        self.config = folder / "uniad.yaml"
        init_args = {
            "backbone": {
                "name": "test_efficientnet.r160_in1k",
                "levels": [1, 2, 3, 4],
                "weights": "random",
                "padding": "default",
            },
            "image_size": 64,
            "d_model": 16,
            "heads": 2,
            "feedforward": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "neighbor_size": 3,
            "optimizer": {"lr": 0.001},
        }
        datasets = [{"name": reader, "root": str(data)}]
        config = {
            "model": {"class_path": "lightning_modules.uniad.UniAD", "init_args": init_args},
            "data": {
                "class_path": "datamodules.UnifiedDataModule",
                "init_args": {"datasets": datasets, "num_workers": 0},
            },
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
            "run": {"results": str(self.results), "heatmaps": False},
            "cache": {"root": str(folder / "cache")},
        }
        self.config.write_text(yaml.safe_dump(config))

    def use(self, model: str, data: dict | None = None, trainer: dict | None = None, **init_args) -> Project:
        """Puts another model, named below lightning_modules, with its arguments into the configuration, and more of the data
        module and the trainer."""
        config = yaml.safe_load(self.config.read_text())
        config["model"] = {"class_path": f"lightning_modules.{model}", "init_args": init_args}
        config["data"]["init_args"] |= data or {}
        config["trainer"] |= trainer or {}
        self.config.write_text(yaml.safe_dump(config))
        return self

    def copied(self, folder: Path) -> Project:
        """The same configuration and finished or interrupted runs in another folder, to be changed there."""
        other = Project(folder, self.data)
        config = yaml.safe_load(other.config.read_text())
        own = yaml.safe_load(self.config.read_text())
        other.config.write_text(yaml.safe_dump(own | {name: config[name] for name in ("run", "cache")}))
        for name in ("results", "cache"):
            shutil.copytree(self.folder / name, folder / name)
        return other

    def arguments(self, *more: str, command: str = "fit", name: str = "first", logger: bool = False) -> list[str]:
        """Arguments of one command; without `logger` nothing is logged."""
        quiet = [] if logger else ["--trainer.logger=false"]
        return [command, f"--config={self.config}", f"--run.name={name}", *quiet, *more]

    def run(self, *more: str, command: str = "fit", name: str = "first", logger: bool = False) -> None:
        """Runs one command in this process."""
        main(self.arguments(*more, command=command, name=name, logger=logger))

    def fit(self, *more: str, name: str = "first") -> StoredRecord:
        """Trains and returns the record."""
        self.run(*more, name=name)
        return self.record(name)

    def record(self, name: str = "first") -> StoredRecord:
        return read_record(self.results / "runs" / "single" / name)

    def checkpoint(self, name: str = "first") -> Path:
        return self.results / "work" / "single" / name / "checkpoints" / "last.ckpt"

    def weights(self, name: str = "first") -> dict[str, torch.Tensor]:
        return torch.load(self.checkpoint(name), weights_only=False)["state_dict"]

    def losses(self, name: str = "first") -> list[float]:
        """Training loss of each epoch, from the record."""
        history = self.record(name).history
        return history[history.metric == "train/loss"].value.tolist()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread per test, whatever number a run sets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _equal_backbones_are_calibrated_once() -> Iterator[None]:
    """The statistics of a random backbone follow from its layers, weights and seed, and a run takes a tenth of its time for
    them; what they are is tested with the models."""
    calibrate, found = backbones._calibrate, {}

    def calibrated(net: nn.Module, seed: int) -> None:
        key = seed, str(net), state_sha256(net.state_dict())
        if key in found:
            net.load_state_dict(found[key])
            net.eval()
        else:
            calibrate(net, seed)
            found[key] = copy.deepcopy(net.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "_calibrate", calibrated)
        yield


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories with masks; not to be changed by a test."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def project(tmp_path: Path, data_root: Path) -> Project:
    """A folder without any run."""
    return Project(tmp_path, data_root)


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Project:
    """The run that `trained` and `finished` are copies of."""
    project = Project(tmp_path_factory.mktemp("original"), data_root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    project.run("--run.heatmaps=true")
    torch.set_num_threads(threads)
    return project


@pytest.fixture(scope="module")
def trained(_original: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose run "first" has finished, with heat maps; not to be changed by a test."""
    return _original.copied(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def finished(_original: Project, tmp_path: Path) -> Project:
    """A project whose run "first" has finished, with heat maps, for a test that changes it."""
    return _original.copied(tmp_path)


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random backbones keep batch norm's first statistics: for tests that only count what a large one has."""
    monkeypatch.setattr(backbones, "_calibrate", lambda net, seed: None)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """The network of the last training at the beginning of each epoch, by epoch index and by the names in a checkpoint."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    original = EpochSeed.on_train_epoch_start

    def keep(self, trainer, module):
        state = {name: value.clone() for name, value in module.state_dict().items()}
        found[trainer.current_epoch] = state
        original(self, trainer, module)

    monkeypatch.setattr(EpochSeed, "on_train_epoch_start", keep)
    return found


class Interruption(BaseException):
    """Stands for a power cut."""


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a project until a power cut in a callback's hook at an epoch index, by default where its second epoch begins."""

    def run(
        project: Project,
        *more: str,
        at: int = 1,
        owner: type = EpochSeed,
        hook: str = "on_train_epoch_start",
        name="first",
    ) -> None:
        original = getattr(owner, hook)

        def cut(self, trainer, *args):
            if trainer.current_epoch == at:
                raise Interruption
            return original(self, trainer, *args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, hook, cut)
            with pytest.raises(Interruption):
                project.run(*more, name=name)

    return run


@pytest.fixture(scope="module")
def trained_once(
    tmp_path_factory: pytest.TempPathFactory, make_project: type[Project], data_root: Path
) -> Callable[..., Project]:
    """By a method's name, its project whose run "first" is finished, trained at the first call of a module; not to be changed
    by a test. `configure(project, method)` puts the method into the project's configuration."""
    made: dict[str, Project] = {}

    def of(method: str, configure: Callable[[Project, str], Project]) -> Project:
        if method not in made:
            made[method] = configure(make_project(tmp_path_factory.mktemp(method), data_root), method)
            made[method].run()
        return made[method]

    return of


@pytest.fixture(scope="session")
def write_data():
    """Writes a dataset of its own for a test that changes it."""
    return write_dataset


@pytest.fixture(scope="session")
def make_project():
    """A project in a folder, on a dataset."""
    return Project


@pytest.fixture(scope="session")
def programs():
    """Starts the training program; see `program.py`."""
    spec = importlib.util.spec_from_file_location("program", Path(__file__).with_name("program.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    started = module.Programs()
    yield started
    started.close()
