"""CFLOW, FastFlow, DRAEM and EfficientAD, whose networks are anomalib's, from photographs to a record and out again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("anomalib", reason="make baselines installs anomalib")

from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork

from lightning_modules.exporting.__main__ import export
from lightning_modules.running.loading import load_run

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [3, 4], "weights": "random", "padding": "default"}
METHODS = {
    "cflow": (
        "cflow.CFLOW",
        {"backbone": BACKBONE, "image_size": 64, "coupling_blocks": 2, "condition": 8, "fibre_batch": 32},
        {"batch_size": 4, "repeat": 1, "drop_last": False},
        {},
    ),
    "fastflow": ("fastflow.FastFlow", {"backbone": BACKBONE, "image_size": 64, "flow_steps": 2}, {"batch_size": 4}, {}),
    "draem": (
        "draem.DRAEM",
        {"image_size": 64, "reconstructive_width": 4, "discriminative_width": 4},
        {"batch_size": 2, "anomalies": {"source": "textures"}},
        {"max_epochs": 8},  # until batch norm's running averages have left their start
    ),
    "efficientad": ("efficientad.EfficientAD", {"image_size": 256}, {"holdout": 0.5}, {"max_epochs": 1}),
}
QUICK = ("cflow", "fastflow", "draem")
"""EfficientAD takes no image below 256 pixels and has one width: seconds a step. It is trained for one step."""
ROOT = Path(__file__).resolve().parents[2]
CONSTRUCTED = """
import sys
asked = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append((event, *arguments[1:]))
        raise OSError("there is no network")
sys.addaudithook(hook)
from lightning_modules import cflow, draem, efficientad, fastflow
from models.backbones import BackboneConfig
levels = BackboneConfig("test_efficientnet.r160_in1k", (3, 4), weights="random", padding="default")
made = [
    cflow.CFLOW(levels, image_size=64, coupling_blocks=2),
    fastflow.FastFlow(levels, image_size=64, flow_steps=2),
    draem.DRAEM(reconstructive_width=4, discriminative_width=4),
    efficientad.EfficientAD(teacher="read in training"),
]
print("ASKED", asked, *(model.method for model in made))
"""
pytestmark = [pytest.mark.program, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher that nobody trained, in anomalib's form."""
    torch.manual_seed(0)
    network = SmallPatchDescriptionNetwork(384)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def few(tmp_path_factory, write_data):
    """One category: an image to train, one held out, two to test."""
    root = write_data(tmp_path_factory.mktemp("few"), train=2)
    shutil.rmtree(root / "disc")
    for file in (*root.rglob("test/*/001.png"), *root.rglob("*/002*.png"), *root.rglob("scratch/001*.png")):
        file.unlink(missing_ok=True)
    return root


@pytest.fixture(scope="module")
def configured(teacher, few):
    """Puts a method into a project's configuration."""

    def put(project, method: str):
        path, arguments, data, trainer = METHODS[method]
        if method == "efficientad":
            arguments = arguments | {"teacher": str(teacher)}
            data = data | {"datasets": [{"name": "mvtec_ad", "root": str(few)}]}
        return project.use(path, data=data, trainer=trainer, **arguments)

    return put


@pytest.fixture(scope="module")
def trained(trained_once, configured):
    return partial(trained_once, configure=configured)


def run_of(project):
    return project.results / "runs" / "single" / "first"


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_a_record_and_its_checkpoint_scores_and_predicts_alike(trained, method, few):
    project = trained(method)
    record = project.record()
    assert record.record.method == method
    assert record.metrics[record.metrics.metric == "pixel_auroc"].value.notna().all()
    project.run(f"--ckpt_path={project.checkpoint()}", "--run.overwrite=true", command="test", name="again")
    again = project.record("again")
    pd.testing.assert_frame_equal(again.metrics, record.metrics)
    assert again.record.notes == record.record.notes
    project.run(f"--data.init_args.predict_root={few / 'bolt' / 'test'}", command="predict")
    folder = project.results / "work" / "single" / "first" / "predictions"
    assert len(pd.read_csv(folder / "scores.csv")) == 2
    assert all(np.isfinite(np.load(path)).all() for path in folder.glob("*.npy"))


@pytest.mark.parametrize("method", QUICK)
def test_a_loaded_run_gives_an_image_its_map_whatever_its_batch(trained, method):
    model = load_run(run_of(trained(method))).module.eval()
    batch = 8
    images = torch.randn(batch + 1, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    images[-1] = 0.5  # a constant image, in a batch of its own
    with torch.no_grad():
        alone = [model(image[None]) for image in images]
        batches = [model(part) for part in images.split(batch)]
    maps, scores = torch.cat([found.maps for found in batches]), torch.cat([found.image_scores for found in batches])
    assert maps.isfinite().all()
    assert maps.flatten(1).amax(1).unique().numel() == batch + 1, "neither clamped nor squashed"
    torch.testing.assert_close(torch.cat([one.maps for one in alone]), maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([one.image_scores for one in alone]), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cflow", "fastflow"])
def test_a_resumed_training_is_the_uninterrupted_one(project, trained, cut_off, configured, method):
    cut_off(configured(project, method))
    project.run()
    torch.testing.assert_close(project.weights(), trained(method).weights(), rtol=0, atol=0)
    assert project.record().record.notes == trained(method).record().record.notes


@pytest.mark.parametrize("method", QUICK)
def test_a_run_leaves_as_a_file_that_agrees_with_it(trained, method, tmp_path):
    assert "read back" in export(run_of(trained(method)), "torch", tmp_path / "run.pt2")


@pytest.mark.parametrize("method", QUICK)
def test_one_model_per_category(project, configured, method):
    configured(project, method)
    project.run("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    assert project.record().metrics.value.notna().any()


def test_constructors_ask_no_network():
    done = subprocess.run([sys.executable, "-c", CONSTRUCTED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ASKED [] cflow fastflow draem efficientad"


def test_the_records_name_what_may_not_be_silently_different(trained):
    notes = {method: " ".join(trained(method).record().record.notes) for method in METHODS}
    assert "permutations, where the released code has rotations" in notes["cflow"]
    assert "scale of the training images" in notes["cflow"]
    assert "synthetic anomalies: source textures" in notes["draem"]
    assert "teacher from a file (sha256 " in notes["efficientad"]
    assert "no penalty on ImageNet images" in notes["efficientad"]
    assert "held-out normal images" in notes["efficientad"]
