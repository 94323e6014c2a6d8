"""CutPaste, Patch SVDD and FCDD from photographs to a record: they train their own trunks, on images."""

from __future__ import annotations

import json
from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import DatasetConfig, UnifiedDataModule
from lightning_modules.cutpaste import CutPaste
from lightning_modules.fcdd import FCDD
from lightning_modules.patch_svdd import PatchSVDD
from lightning_modules.running.command_line import main
from lightning_modules.running.loading import load_run

SMALL = {"widths": [4, 4, 4, 4, 4, 4, 4], "dim": 4, "hidden": 8}
METHODS = {
    "cutpaste": ("cutpaste.CutPaste", {"image_size": 32, "trunk": "test_resnet", "head_layers": [8]}, 2),
    "patch_svdd": ("patch_svdd.PatchSVDD", {"image_size": 64, "optimizer": {"lr": 1e-3}, **SMALL}, 1),
    "fcdd": (
        "fcdd.FCDD",
        {
            "image_size": 60,
            "net": "cnn224",
            "upsampling_std": 3,
            "confetti": {"coloured": 1e-3, "dark": 1e-3, "sides": [4, 12]},
        },
        2,
    ),
}


def configured(project, method: str, **options):
    path, arguments, repeat = METHODS[method]
    return project.use(path, data={"batch_size": 4, "repeat": repeat}, **arguments | options)


@pytest.fixture
def trained(trained_once):
    return partial(trained_once, configure=configured)


def network_of(project, name: str = "first") -> dict[str, torch.Tensor]:
    return {key: value for key, value in project.weights(name).items() if key.startswith("network.")}


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_a_record_and_its_checkpoint_scores_alike(trained, method, data_root):
    project = trained(method)
    record = project.record()
    assert record.record.method == method
    assert record.record.backbone["weights"] == "scratch"
    assert not record.record.random_weights
    assert record.metrics[record.metrics.metric == "image_auroc"].value.notna().all()
    assert not any("features" in path.name for path in (project.folder / "cache").rglob("*"))
    project.run(f"--ckpt_path={project.checkpoint()}", "--run.overwrite=true", command="test", name="again")
    pd.testing.assert_frame_equal(project.record("again").metrics, record.metrics)
    project.run(f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}", command="predict")
    folder = project.results / "work" / "single" / "first" / "predictions"
    assert len(pd.read_csv(folder / "scores.csv")) == 5
    assert len(list(folder.glob("*.npy"))) == (0 if method == "cutpaste" else 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_loaded_without_data_or_the_weights_that_it_started_from(trained, method):
    project = trained(method)
    model = load_run(project.results / "runs" / "single" / "first").module
    own = network_of(project)
    assert all(torch.equal(value, own[f"network.{name}"]) for name, value in model.network.state_dict().items())
    assert model(torch.zeros(1, 3, *model.image_size)).image_scores.isfinite().all()


def test_a_backbone_from_the_environment_is_refused_where_there_is_none(trained, monkeypatch):
    project = trained("patch_svdd")
    monkeypatch.setenv("WEIGHTS", "random")
    with pytest.raises(SystemExit, match="backbone"):
        project.run(name="other")


def test_an_image_level_method_has_no_pixel_number_and_no_picture(trained):
    record = trained("cutpaste").record()
    pixels = record.metrics[record.metrics.metric.str.startswith("pixel")]
    assert len(pixels)
    assert pixels.value.isna().all()
    assert any("no map" in note for note in record.record.notes)


def test_the_records_name_what_may_not_be_silently_different(trained):
    notes = {method: " ".join(trained(method).record().record.notes) for method in METHODS}
    assert "3way" in notes["cutpaste"]
    assert "single model" in notes["cutpaste"]
    assert "12 steps (the paper: 65,536)" in notes["cutpaste"]
    assert "lambda 0.001; 6 steps" in notes["patch_svdd"]
    assert "exact nearest neighbours" in notes["patch_svdd"]
    assert "12 of 64 pixels and 972 of 32" in notes["patch_svdd"]  # 12 images, 1 and 9 x 9 patches each
    assert "unsupervised: confetti" in notes["fcdd"]
    assert "not normalised" in notes["fcdd"]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_uninterrupted_one(project, trained, cut_off, method):
    cut_off(configured(project, method))
    project.run()
    whole, resumed = network_of(trained(method)), network_of(project)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "patch_svdd" else pytest.mark.program) for m in METHODS]
)
def test_a_curve_changes_nothing(trained, method):
    project = trained(method)
    project.run("--run.curve_every=1", name="curve")
    assert all(torch.equal(value, network_of(project)[name]) for name, value in network_of(project, "curve").items())


def test_patch_svdds_last_weight_rests_and_everything_else_learns(trained, begun):
    project = trained("patch_svdd")
    project.run("--model.init_args.last_weight=trained", name="trained")
    fixed, moved = network_of(project), network_of(project, "trained")
    start = {name: value for name, value in begun[0].items() if name in fixed}
    same = {name for name, value in start.items() if torch.equal(value, fixed[name])}
    assert {"network.cls_64.fc3.weight", "network.cls_32.fc3.weight"} == {n for n in same if "mean_image" not in n}
    assert not torch.equal(moved["network.cls_64.fc3.weight"], start["network.cls_64.fc3.weight"])


def test_the_patch_model_has_a_map_and_scores_an_image_by_its_highest_window(project):
    configured(project, "cutpaste", localisation="patches", patch_side=16, patch_stride=8)
    project.run()
    record = project.record()
    assert record.metrics[record.metrics.metric == "pixel_auroc"].value.notna().all()
    assert any("windows of 16 pixels every 8" in note for note in record.record.notes)
    model = load_run(project.results / "runs" / "single" / "first").module
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scored = model(images)
        corner = model.network.score(model.network.embed(images[:, :, 16:, 8:24])).float()
    torch.testing.assert_close(scored.level_maps[0][:, 2, 1], corner, rtol=1e-4, atol=1e-5)
    assert torch.equal(scored.image_scores, scored.level_maps[0].flatten(1).amax(1))
    assert scored.maps.shape == (2, 32, 32)


def test_fcdds_frozen_part_keeps_its_weights_while_its_statistics_move_unless_they_rest(project, begun, data_root):
    configured(project, "fcdd", net="vgg11_bn", start="scratch", image_size=30)
    project.run("--trainer.max_epochs=1")
    start, batch = begun[0], network_of(project)
    for name in ("features.0.weight", "features.1.weight", "features.11.bias"):
        assert torch.equal(start[f"network.net.{name}"], batch[f"network.net.{name}"])
    assert not torch.equal(start["network.net.features.15.weight"], batch["network.net.features.15.weight"])
    moving = "network.net.features.1.running_mean"
    assert not torch.equal(start[moving], batch[moving])
    assert any("random weights" in note for note in project.record().record.notes)
    module = FCDD(net="vgg11_bn", start="scratch", image_size=30, frozen_norm="running")
    module.set_protocol("clean", "last")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = UnifiedDataModule([DatasetConfig("mvtec_ad", str(data_root))], 30, "pil_bilinear", 4, num_workers=0)
    L.Trainer(max_epochs=1, enable_model_summary=False, **options).fit(module, datamodule=data)
    assert torch.equal(before[moving], module.state_dict()[moving])
    learnt = "network.net.features.15.weight"
    assert not torch.equal(before[learnt], module.state_dict()[learnt])


def test_real_defects_are_refused_in_clean_and_marked_elsewhere(trained):
    project = trained("fcdd")
    defects = "--model.init_args.supervision=real_defects"
    with pytest.raises(SystemExit, match=r"not unsupervised, and run\.protocol=clean refuses it"):
        project.run(defects, name="refused")
    project.run(defects, "--run.protocol=as_released", "--run.selection=last", name="leaking")
    record = project.record("leaking").record
    assert record.protocol == "as_released"
    assert any(note.startswith("SEMI-SUPERVISED") for note in record.notes)


def test_a_protocol_that_selects_on_test_images_is_refused_where_no_paper_does(trained):
    with pytest.raises(SystemExit, match=r"run\.selection=last"):
        trained("cutpaste").run("--run.protocol=as_released", name="other")


def test_other_synthetic_anomalies_are_refused(trained):
    with pytest.raises(SystemExit, match=r"data\.init_args\.anomalies"):
        trained("cutpaste").run("--data.init_args.anomalies.source=textures", name="other")


def test_a_frozen_trunk_keeps_its_weights_and_only_those(trained, begun):
    project = trained("cutpaste")
    project.run("--model.init_args.frozen_steps=1000", name="frozen")
    frozen = network_of(project, "frozen")
    start = {name: value for name, value in begun[0].items() if name in frozen}
    for name, value in start.items():
        if "trunk" in name and "running" not in name and "num_batches" not in name:
            assert torch.equal(value, frozen[name]), name
    assert not torch.equal(start["network.out.weight"], frozen["network.out.weight"])
    running = next(name for name in start if name.startswith("network.trunk") and name.endswith("running_mean"))
    assert not torch.equal(start[running], frozen[running])


def test_authors_encoders_score_without_training(trained, tmp_path, data_root):
    project = trained("patch_svdd")
    theirs = {n.removeprefix("network.encoder."): v for n, v in network_of(project).items() if ".encoder." in n}
    torch.save(theirs, tmp_path / "enchier.pkl")
    main(["import", "--method=patch_svdd", f"--checkpoint={tmp_path / 'enchier.pkl'}", f"--config={project.config}",
          "--run.name=theirs", "--trainer.logger=false"])  # fmt: skip
    config = project.results / "runs" / "imported" / "theirs" / "config.yaml"
    from results.aggregator.records import read_record

    theirs, ours = read_record(config.parent), project.record()
    np.testing.assert_allclose(theirs.metrics.value, ours.metrics.value, atol=1e-6)  # the same bank, made anew
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    main(["predict", f"--config={config}", "--trainer.logger=false", images])
    folder = project.results / "work" / "imported" / "theirs" / "predictions"
    assert len(pd.read_csv(folder / "scores.csv")) == 5


@pytest.mark.parametrize("method", METHODS)
def test_the_score_of_an_image_does_not_depend_on_its_batch(trained, method):
    project = trained(method)
    kinds = {"cutpaste": CutPaste, "patch_svdd": PatchSVDD, "fcdd": FCDD}
    options = {k: v for k, v in METHODS[method][1].items() if k not in ("optimizer", "confetti")}
    module = kinds[method](**options)
    module.load_state_dict({k: v for k, v in project.weights().items()})
    images = torch.randn(3, 3, *module.image_size, generator=torch.Generator().manual_seed(0))
    images[2] = 0.5  # a constant image
    with torch.no_grad():
        together = module.eval()(images)
        alone = [module(image[None]) for image in images]
    for number, one in enumerate(alone):
        torch.testing.assert_close(together.maps[number], one.maps[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.image_scores[number], one.image_scores[0], rtol=1e-4, atol=1e-6)
    assert together.maps.isfinite().all()
    assert together.image_scores.isfinite().all()


def test_impossible_options_are_refused():
    for kind, options, message in (
        (CutPaste, {"frozen_steps": -1}, "frozen_steps"),
        (CutPaste, {"trunk": "resnet81"}, "knows no trunk"),
        (CutPaste, {"start": "packaged"}, "no package holds weights of resnet18"),
        (CutPaste, {"density": "kde"}, "gaussian, kernels"),
        (CutPaste, {"localisation": "gradcam"}, "none or patches"),
        (CutPaste, {"localisation": "patches", "density": "kernels"}, "density=gaussian"),
        (CutPaste, {"localisation": "patches", "image_size": 48}, "smaller patches"),
        (PatchSVDD, {"image_size": 72}, "multiples of 16"),
        (PatchSVDD, {"near_weight": -1.0}, "must not be negative"),
        (PatchSVDD, {"position_clip": "moved"}, "kept, redraw"),
        (PatchSVDD, {"last_weight": "free"}, "fixed, trained"),
        (FCDD, {"net": "vgg16"}, "vgg11_bn, cnn224"),
        (FCDD, {"net": "cnn224", "supervision": "none"}, "confetti or real_defects"),
        (FCDD, {"net": "cnn224", "upsampling_std": 0.0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)


@pytest.mark.program
def test_parameter_counts_are_the_papers():
    def trainable(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert trainable(CutPaste()) == 11_176_512 + 329_600 + 387
    assert trainable(PatchSVDD()) == 401_984 + 2 * (25_864 - 1_024)
    assert trainable(FCDD(start="scratch")) == 3_542_529


@pytest.mark.program
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_gather_the_statistics_of_one(programs, make_project, write_data, tmp_path, method):
    """Without a step of training, on five images over two processes."""
    data = write_data(tmp_path / "data", train=5)
    project = configured(make_project(tmp_path, data), method)
    bolts = [{"name": "mvtec_ad", "root": str(data), "categories": ["bolt"]}]
    more = (
        f"--data.init_args.datasets={json.dumps(bolts)}",
        "--model.init_args.optimizer.lr=0",
        "--trainer.max_epochs=1",
    )
    project.run(*more, name="one")
    programs.run(project.arguments(*more, "--trainer.devices=2", "--trainer.strategy=ddp", name="two"))
    one, two = network_of(project, "one"), network_of(project, "two")
    estimated = ("mean", "precision", "bank", "low", "high", "mean_image")
    chosen = [name for name in one if name.split(".")[1].startswith(estimated)]
    assert chosen
    for name in chosen:
        if method != "cutpaste":  # whose running statistics differ with the batches
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
    record = project.record("two")
    assert record.record.provenance["world_size"] == 2
    assert record.metrics[record.metrics.metric == "image_auroc"].value.notna().all()
