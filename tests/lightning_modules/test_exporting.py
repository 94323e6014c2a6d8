"""A run as a file: the same maps and scores in another program, or no file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import RESIZES
from lightning_modules.exporting import formats
from lightning_modules.exporting.__main__ import export
from lightning_modules.exporting.agreement import Disagreement, compare
from lightning_modules.exporting.graph import Scorer
from lightning_modules.exporting.images import check_images
from lightning_modules.exporting.metadata import PILLOW
from lightning_modules.exporting.rounding import UNIT, tolerances
from lightning_modules.running.loading import load_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def run_of(project, name: str = "first") -> Path:
    return project.results / "runs" / "single" / name


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("export") / "run.pt2"
    return file, export(run_of(trained), "torch", file)


@pytest.mark.program
def test_the_file_gives_the_scores_of_load_run_for_any_number_of_photographs(trained, exported, data_root):
    photographs = sorted((data_root / "bolt" / "test").rglob("*.png"))
    model = load_run(run_of(trained))
    program = torch.export.load(exported[0]).module()
    for count in (1, 2, len(photographs)):
        pixels = torch.cat(list(model.preparation.resized(photographs[:count], 32)))
        expected = model(photographs[:count])
        maps, scores = program(pixels)
        assert maps.shape == (count, 64, 64)
        torch.testing.assert_close(maps, expected.maps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores, expected.image_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.program
def test_the_metadata_are_plain_json_with_the_rules_of_the_run(trained, exported):
    extra = {"unirecon.json": ""}
    torch.export.load(exported[0], extra_files=extra)
    about = json.loads(extra["unirecon.json"])
    assert about["image_size"] == about["resize_to"] == [64, 64]
    assert about["resize"]["rule"] == "pil_bilinear"
    assert about["categories"] == ["bolt", "disc"]
    assert list(about["outputs"]) == ["maps", "image_scores"]
    assert about["check"]["images"] == "10 test images of the run"
    assert set(about["decision"]["thresholds"]) == {"bolt", "disc"}
    for name, found in about["check"]["outputs"].items():
        assert 0 <= found["largest_difference"] <= found["tolerance"], name


@pytest.mark.program
def test_photographs_that_are_given_are_those_that_check(trained, tmp_path, data_root):
    said = export(run_of(trained), "torch", tmp_path / "run.pt2", images=str(data_root / "disc" / "train"))
    assert "6 photographs from" in said


@pytest.mark.program
def test_without_the_data_noise_checks_and_the_report_says_so(trained):
    found = check_images(Path("/nowhere"), "", load_run(run_of(trained)).preparation, None)
    assert found.source == "8 images of noise"
    assert found.pixels.shape == (8, 64, 64, 3)


@pytest.mark.program
def test_a_file_that_disagrees_is_not_left_behind(trained, tmp_path, monkeypatch):
    """Its mean is one of 255 levels off."""

    class Wrong(Scorer):
        def __init__(self, model):
            super().__init__(model)
            self.mean += 1 / 255

    monkeypatch.setattr("lightning_modules.exporting.__main__.Scorer", Wrong)
    with pytest.raises(Disagreement, match=r"The file's maps differ from the run's by .* on .*\.png, and rounding"):
        export(run_of(trained), "torch", tmp_path / "run.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.program
def test_numbers_that_are_none_are_a_disagreement(trained):
    model = load_run(run_of(trained))
    images = check_images(run_of(trained), "", model.preparation, None)

    def broken(pixels: np.ndarray) -> list[np.ndarray]:
        maps = np.full((len(pixels), 64, 64), np.nan, np.float32)
        return [maps, maps[:, 0, 0]]

    with pytest.raises(Disagreement):
        compare(model, ("maps", "image_scores"), images, broken)


def test_the_tolerance_of_one_layer_is_that_of_its_sums():
    """A sum of K terms of size s rounds by about sqrt(K) units of s; of 4,000 draws the largest is about 4 deviations."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 1000)
    inputs = torch.randn(4, 1024)
    (found,) = tolerances(lambda: (layer(inputs),))
    deviation = UNIT * 32 * float(layer(inputs).square().mean().sqrt())
    assert 8 * 3 * deviation < found < 8 * 6 * deviation


def test_the_tolerance_of_a_mean_covers_a_program_that_adds_one_value_after_the_other():
    """onnxruntime did so with FCDD's contrast, the mean over all pixels of an image: hundreds of units."""
    values = torch.rand(4, 3 * 128 * 128, generator=torch.Generator().manual_seed(0))
    (found,) = tolerances(lambda: (values.mean(dim=1),))
    in_order = np.cumsum(values.numpy(), axis=1, dtype=np.float32)[:, -1] / np.float32(values.shape[1])
    off = float(np.abs(in_order - values.mean(dim=1).numpy()).max())
    assert 8 * UNIT < off < found
    assert found < 8 * 4 * UNIT * (3 * 128 * 128) ** 0.5 * 0.51


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_a_method_without_a_graph_is_refused_with_its_reason(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.uniad.UniAD.unexported", "its scores are drawn by lot")
    with pytest.raises(ValueError, match=r"uniad cannot be exported: its scores are drawn by lot\."):
        export(run_of(trained), "torch", tmp_path / "run.pt2")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name)
    )
    with pytest.raises(ValueError, match="onnx, onnxscript, onnxruntime are not installed: make export-requirements"):
        formats.FORMATS["onnx"].check_packages()


# ---- resizing in other programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RESIZES)
@pytest.mark.parametrize("size", [(50, 51), (300, 170), (64, 64)])
def test_pillow_resizes_as_the_metadata_say(rule, size):
    """Noise is the hardest picture: neighbouring pixels have nothing in common."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image, how = Image.fromarray(noise), PILLOW[rule]
    filter_ = Image.Resampling[how["filter"]]
    if how["call"] == "resize":
        found = image.resize((96, 64), filter_)
    else:
        steps = (image.width / 96, 0, 0, 0, image.height / 64, 0)
        found = image.transform((96, 64), Image.Transform.AFFINE, steps, filter_)
    difference = np.abs(np.asarray(found).astype(int) - RESIZES[rule](noise, 64, 96))
    assert difference.max() <= how["largest_difference"]


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_the_example_needs_nothing_of_this_project(trained, tmp_path, data_root):
    """It runs in another folder, with another module search path, and gives the run's scores and maps."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="make export-requirements")
    import subprocess

    file = tmp_path / "run.onnx"
    assert "read back and run by onnxruntime on 10 test images of the run" in export(run_of(trained), "onnx", file)
    photograph = data_root / "bolt" / "test" / "scratch" / "000.png"
    example = Path(formats.__file__).with_name("example.py")
    command = [sys.executable, str(example), str(file), str(photograph), "--category", "bolt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = load_run(run_of(trained))(photograph)
    said = float(done.stdout.partition("score ")[2].partition(",")[0])
    assert said == pytest.approx(expected.image_scores.item(), rel=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "0000_000.npy"), expected.maps[0].numpy(), rtol=1e-4, atol=1e-5)
    assert Image.open(tmp_path / "0000_000.png").size == (64, 64)

    (tmp_path / "notes.txt").write_text("no picture")
    done = subprocess.run([*command[:3], "notes.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "notes.txt cannot be read as an image: cannot identify image file 'notes.txt'\n"
