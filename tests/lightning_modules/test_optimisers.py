"""Any optimiser and schedule, per step or per epoch; and the configurations of records written before there was a choice."""

from __future__ import annotations

import inspect
import math
import shutil
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_modules.base import Interval, Recipe, ReconstructionModule
from lightning_modules.running import internals
from lightning_modules.running.earlier import translated
from lightning_modules.running.methods import import_methods
from lightning_modules.running.parser import PlainParser
from lightning_modules.uniad import UniAD
from models.backbones import BackboneConfig
from models.head import HeadConfig
from models.reconstruction import Pair, ReconstructionNetwork

EARLIER = Path(__file__).parent / "earlier"
"""A record's configuration and scores, and its checkpoint without the optimiser's state, as commit 2352405 wrote them."""
BACKBONE = BackboneConfig("test_resnet", (2,), weights="random")
pytestmark = pytest.mark.filterwarnings("ignore:RANDOM WEIGHTS")


class Cautious(AdamW):
    """An optimiser of a method's own."""

    def __init__(self, params: list, lr: float = 1e-3, caution: float = 2.0) -> None:
        super().__init__(params, lr=lr / caution)


class WarmCosine(LambdaLR):
    """A schedule of a method's own: rises over `warm` steps, then falls as a cosine to zero at `steps`."""

    def __init__(self, optimizer: Optimizer, warm: int, steps: int) -> None:
        def factor(step: int) -> float:
            return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

        super().__init__(optimizer, factor)


class Linear(ReconstructionNetwork):
    preparation = "halved"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def prepare(self, levels: list[Tensor]) -> list[Tensor]:
        return [level / 2 for level in levels]

    def forward(self, features: list[Tensor]) -> list[Pair]:
        return [Pair(features[0], self.layer(features[0]))]


class Warmed(ReconstructionModule):
    """A method that brings its own optimiser and schedule, without a line in the base."""

    recipe = Recipe(resize="pil_bilinear", batch_size=2, max_epochs=2)

    def __init__(
        self,
        backbone: BackboneConfig = BACKBONE,
        head: HeadConfig = HeadConfig(),
        optimizer: OptimizerCallable = lambda parameters: Cautious(parameters, lr=0.02),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmCosine(optimizer, warm=2, steps=6),
        lr_interval: Interval = "step",
        image_size: int = 64,
    ) -> None:
        super().__init__(backbone, head, optimizer, image_size, lr_scheduler, lr_interval)
        self.network = Linear(self.extractor.channels[0])


class Remembered(ReconstructionModule):
    """A method that is fitted by a pass over the images, without gradients."""

    recipe = Recipe(resize="pil_bilinear", batch_size=2, max_epochs=1)

    def __init__(self) -> None:
        super().__init__(BACKBONE, HeadConfig(), None, 64)
        self.network = Linear(self.extractor.channels[0]).requires_grad_(False)
        self.seen, self.fitted = [], 0

    def training_step(self, batch: dict, batch_idx: int) -> None:
        self.seen.append(self.features(batch)[0])

    def on_train_end(self) -> None:
        self.fitted = len(torch.cat(self.seen))


def images(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 64, 64, generator=generator)
    return [{"image": image, "label": 0, "category": "bolt", "path": f"{n}.png"} for n, image in enumerate(pixels)]


def recorded_arguments(project, name: str = "first") -> dict:
    """The method's arguments in a run's record."""
    config = project.results / "runs" / "single" / name / "config.yaml"
    return yaml.safe_load(config.read_text())["model"]["init_args"]


def fit(module: L.LightningModule, tmp_path: Path, **options: object) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, DataLoader(images(6), batch_size=2))


def test_a_method_warms_up_and_falls_with_every_step_by_its_own_optimiser(tmp_path):
    rates = []

    class Watched(Warmed):
        def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = Watched()
    fit(module, tmp_path, max_epochs=2)
    expected = [0.5, 1, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3))]
    assert rates == pytest.approx([0.01 * factor for factor in expected])
    assert isinstance(module.trainer.optimizers[0], Cautious)


def test_features_are_prepared_by_the_network_whether_cached_or_not():
    module = Warmed()
    (image,) = images(1)
    batch = {"image": image["image"][None]}
    (raw,), (prepared,) = module.extractor(batch["image"]), module.features(batch)
    torch.testing.assert_close(prepared, raw / 2, rtol=0, atol=0)
    assert module.features({"features": [prepared]})[0] is prepared


def test_a_method_without_gradients_is_fitted_by_one_pass(tmp_path):
    module = Remembered()
    fit(module, tmp_path)
    assert module.fitted == 6


@pytest.mark.parametrize("option", ["--model.init_args.optimizer=Cautious", "--model.init_args.optimizer.lr=1e-2"])
def test_optimiser_and_schedule_are_chosen_on_the_command_line_and_recorded(project, option):
    schedule = ("--model.init_args.lr_scheduler=OneCycleLR", "--model.init_args.lr_scheduler.max_lr=0.01")
    steps = ("--model.init_args.lr_scheduler.total_steps=20", "--model.init_args.lr_interval=step")
    path = f"{__name__}.Cautious"
    project.fit(option.replace("Cautious", path), *schedule, *steps, "--trainer.max_epochs=1")
    arguments = recorded_arguments(project)
    assert arguments["optimizer"]["class_path"] == (path if "Cautious" in option else "torch.optim.AdamW")
    assert arguments["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.OneCycleLR"
    assert arguments["lr_interval"] == "step"


@pytest.mark.parametrize("method", ["uniad.UniAD", "unias.UniAS", "identical_shortcut.IdenticalShortcut"])
def test_the_papers_schedule_is_a_methods_own_default_on_the_command_line(method):
    """A base class's default in its place would train a thousand epochs at the first learning rate."""
    parser = PlainParser()
    parser.add_subclass_arguments(ReconstructionModule, "model")
    arguments = parser.parse_args([f"--model=lightning_modules.{method}"]).model.init_args
    assert arguments.lr_scheduler.class_path == "lightning_modules.running.schedules.Drops"
    assert arguments.lr_scheduler.init_args.first == (401 if "unias" in method else 801)
    assert arguments.optimizer.init_args.weight_decay == 1e-4


def test_mixed_precision_still_clips_the_gradients_of_a_fused_optimiser(tmp_path):
    fit(UniAD(BACKBONE, image_size=64, d_model=16, heads=2, grid=(4, 4), neighbor_size=3), tmp_path,
        precision="bf16-mixed", gradient_clip_val=0.1)  # fmt: skip


def test_lightning_refuses_to_clip_without_the_touch_inside_the_optimiser(tmp_path, monkeypatch):
    """When this fails, the libraries have changed and `allow_clipping` may go."""
    monkeypatch.setattr(internals, "allow_clipping", lambda optimizer: None)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        test_mixed_precision_still_clips_the_gradients_of_a_fused_optimiser(tmp_path)


def test_an_impossible_learning_rate_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="learning rate"):
        Warmed(optimizer=lambda parameters: AdamW(parameters, lr=-1.0))


# ---- records of before -----------------------------------------------------------------------------------------------


def test_an_earlier_record_is_scored_again_with_the_same_scores(project):
    """Its optimiser is understood, its checkpoint loads, and the path from image to score has not moved."""
    checkpoint = project.checkpoint("before")
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(EARLIER / "last.ckpt", checkpoint)
    project.config = EARLIER / "config.yaml"
    project.run(
        f"--data.init_args.datasets.root={project.data}",
        f"--run.results={project.results}",
        f"--cache.root={project.folder / 'cache'}",
        command="test",
        name="before",
    )
    now = pd.read_csv(project.results / "runs" / "single" / "before" / "image_scores.csv")
    then = pd.read_csv(EARLIER / "image_scores.csv")
    assert now.id.tolist() == then.id.tolist()
    # float32 features and maps, whose products are summed in another order on another machine
    assert now.image_score.tolist() == pytest.approx(then.image_score.tolist(), rel=1e-4)
    arguments = recorded_arguments(project, "before")
    assert arguments["optimizer"]["init_args"]["weight_decay"] == 1e-4
    assert arguments["lr_scheduler"]["init_args"]["milestones"] == [1]


def test_only_the_earlier_form_of_an_optimiser_is_rewritten():
    def model(**arguments: object) -> dict:
        return {"model": {"class_path": "x", "init_args": arguments}}

    new = model(optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1.0}}, lr_scheduler=None)
    for value in (new, model(optimizer={"lr": 0.1}), model(), {"model": None}, {}, None, 3, "text", ["a"]):
        assert translated(value) == value
    earlier = model(optimizer={"name": "adam", "lr": 0.1, "lr_drops": [], "lr_gamma": 0.1}, k=1)
    rewritten = translated(earlier)["model"]["init_args"]
    assert rewritten["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1, "fused": True}}
    assert (rewritten["lr_scheduler"], rewritten["k"]) == (None, 1)
    assert earlier["model"]["init_args"]["optimizer"]["name"] == "adam"


def test_no_method_shares_the_name_of_an_argument_that_is_none_in_the_base():
    # jsonargparse 4.46 hands the base's None on to the subclass, which then trains without its optimiser or schedule.
    named = inspect.signature(ReconstructionModule.__init__).parameters
    may_be_none = {name for name, parameter in named.items() if "None" in str(parameter.annotation)}
    assert {"make_optimizer", "schedule"} <= may_be_none
    for method in import_methods().values():
        assert not may_be_none & set(inspect.signature(method.__init__).parameters), method
