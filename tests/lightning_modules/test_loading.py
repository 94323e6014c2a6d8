"""`load_run`: a finished run in another program gives the scores that `predict` gives, from what lies on the machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import lightning_modules
from datamodules.errors import DataError
from lightning_modules import load_run
from lightning_modules.running.command_line import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BACKBONE = {"name": "test_efficientnet.r160_in1k", "weights": "random", "padding": "default"}
EARLIER = Path(__file__).with_name("earlier")


def run_of(project, name: str = "first", sweep: str = "single") -> Path:
    return project.results / "runs" / sweep / name


def predicted(project, images: Path, run: Path) -> tuple[pd.Series, list[np.ndarray]]:
    """Scores by path and maps, in the order of paths, that `predict` writes for a folder."""
    main(["predict", f"--config={run / 'config.yaml'}", f"--data.init_args.predict_root={images}",
          "--trainer.logger=false"])  # fmt: skip
    folder = run.parents[2] / "work" / run.parent.name / run.name / "predictions"
    scores = pd.read_csv(folder / "scores.csv").set_index("image").image_score
    return scores, [np.load(file) for file in sorted(folder.glob("*.npy"))]


def with_method(project, path: str, data: dict | None = None, **options):
    """The tests' project with another method."""
    trainer = {"max_epochs": None if "patchcore" in path or "padim" in path else 1}
    return project.use(path, data, trainer, **{"backbone": BACKBONE, "image_size": 64, **options})


def assert_scores_are_those_of_predict(project, images: Path, run: Path, **options) -> None:
    scores, maps = predicted(project, images, run)
    scored = load_run(run, **options)(list(scores.index))
    # The same float32 operations; the two only differ in how many images are scored at a time.
    np.testing.assert_allclose(scored.image_scores.numpy(), scores.to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(scored.maps.numpy(), np.stack(maps), rtol=1e-4, atol=1e-5)


# ---- the same numbers ------------------------------------------------------------------------------------------------


def test_files_get_the_scores_and_maps_of_predict(trained, data_root):
    assert_scores_are_those_of_predict(trained, data_root / "bolt" / "test", run_of(trained))


@pytest.fixture(scope="module")
def model(trained):
    return load_run(run_of(trained))


@pytest.fixture(scope="module")
def photograph(data_root) -> Path:
    return data_root / "bolt" / "test" / "scratch" / "000.png"


def test_one_photograph_gets_one_score_in_whatever_form_it_is_handed_over(model, photograph, tmp_path):
    pixels = torch.from_numpy(np.asarray(Image.open(photograph)).copy()).permute(2, 0, 1)
    forms = {
        "path": str(photograph),
        "paths": [photograph],
        "PIL": Image.open(photograph),
        "uint8": pixels,
        "floats": pixels / 255,
        "batch": pixels[None],
    }
    scored = {name: model(form) for name, form in forms.items()}
    for name, one in scored.items():
        assert one.maps.shape == (1, 64, 64), name
        assert torch.equal(one.maps, scored["path"].maps), name
        assert torch.equal(one.image_scores, scored["path"].image_scores), name
    mixed = model([photograph, pixels, Image.open(photograph)])
    assert torch.allclose(mixed.image_scores, scored["path"].image_scores.expand(3), rtol=1e-5)


def test_a_turned_or_transparent_photograph_is_the_same_in_memory_as_on_disk(model, photograph, tmp_path):
    wide = Image.open(photograph).crop((0, 0, 72, 50))
    exif = Image.Exif()
    exif[274] = 6
    wide.save(tmp_path / "turned.png", exif=exif)
    clear = wide.convert("RGBA")
    clear.putalpha(40)
    clear.save(tmp_path / "clear.png")
    for name in ("turned.png", "clear.png"):
        from_disk, in_memory = model(tmp_path / name), model(Image.open(tmp_path / name))
        assert torch.equal(from_disk.maps, in_memory.maps), name


def test_more_images_than_are_scored_at_a_time_keep_their_order(model, data_root):
    paths = sorted((data_root / "disc").rglob("*.png"))[:7]
    whole = model(paths)
    model.batch_size, before = 3, model.batch_size
    parts = model(paths)
    model.batch_size = before
    assert torch.allclose(whole.image_scores, parts.image_scores, rtol=1e-5)
    assert [level.shape for level in whole.level_maps] == [level.shape for level in parts.level_maps]


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("patchcore.PatchCore", {"coreset": {"ratio": 0.2}}),
        ("padim.PaDiM", {"kept": 8}),
    ],
)
def test_a_fitted_method_scores_as_predict_does(make_project, tmp_path, data_root, path, options):
    levels = {"backbone": {**BACKBONE, "levels": [2, 3, 4]}}
    project = with_method(make_project(tmp_path, data_root), path, **{**options, **levels})
    project.run()
    assert_scores_are_those_of_predict(project, data_root / "bolt" / "test", run_of(project))


def test_maps_are_rescaled_by_the_runs_quantiles(make_project, tmp_path, data_root):
    options = {"pooled_channels": 8, "backbone": {**BACKBONE, "levels": [3, 4]}}
    project = with_method(make_project(tmp_path, data_root), "ulsad.ULSAD", {"holdout": 0.34}, **options)
    project.run()
    assert load_run(run_of(project)).module.network.quantiles.groups
    assert_scores_are_those_of_predict(project, data_root / "bolt" / "test", run_of(project))


def test_a_network_that_the_data_sized_comes_back(make_project, tmp_path, data_root):
    project = with_method(make_project(tmp_path, data_root), "dfr.DFR",
                          backbone={**BACKBONE, "levels": [1, 2, 3, 4]})  # fmt: skip
    project.run()
    assert_scores_are_those_of_predict(project, data_root / "bolt" / "test", run_of(project))


def test_a_run_of_several_models_takes_that_of_the_category(project, data_root):
    project.run("--data.init_args.setting=per_category", "--trainer.max_epochs=1")
    run = run_of(project)
    with pytest.raises(ValueError, match=r"one model per category; name one of bolt, disc"):
        load_run(run)
    with pytest.raises(ValueError, match="'nut' is not a category of single/first; it has bolt, disc"):
        load_run(run, category="nut")
    part = project.results / "work" / "single" / "first" / "runs" / "categories" / "disc"
    scores, _ = predicted(project, data_root / "disc" / "test", part)
    own = load_run(run, category="disc")(list(scores.index)).image_scores
    np.testing.assert_allclose(own.numpy(), scores.to_numpy(), rtol=1e-5)
    shutil.rmtree(part)
    with pytest.raises(FileNotFoundError, match="The model of disc is not in"):
        load_run(run, category="disc")


def test_a_method_that_asks_for_the_category_is_told(make_project, tmp_path, data_root):
    options = {"d_model": 16, "heads": 2, "feedforward": 32, "encoder_layers": 1, "decoder_layers": 1, "codes": 8,
               "grid": [8, 8], "backbone": {**BACKBONE, "levels": [1, 2, 3, 4]}}  # fmt: skip
    project = with_method(make_project(tmp_path, data_root), "hvq_trans.HVQTrans", **options)
    project.run()
    image = data_root / "bolt" / "test" / "scratch" / "000.png"
    with pytest.raises(DataError, match="it knows bolt, disc"):
        load_run(run_of(project))(image)
    scores = pd.read_csv(run_of(project) / "image_scores.csv").set_index("path").image_score
    own = load_run(run_of(project), category="bolt")(image).image_scores
    assert own.item() == pytest.approx(scores[str(image)], rel=1e-5)


# ---- what the record says --------------------------------------------------------------------------------------------


def test_the_data_may_be_gone_and_no_draw_of_the_caller_changes(tmp_path, write_data, make_project, photograph):
    project = make_project(tmp_path, write_data(tmp_path / "data"))
    project.run("--trainer.max_epochs=1")
    before = load_run(run_of(project))(photograph).image_scores
    for folder in ("data", "cache"):
        shutil.rmtree(tmp_path / folder)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    after = load_run(run_of(project))(photograph).image_scores
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(before, after)


def test_given_normalisation_bit_depth_and_mixed_precision_are_the_runs(project, data_root, photograph):
    project.run("--data.init_args.mean=[0.4,0.5,0.6]", "--data.init_args.std=[0.2,0.2,0.2]",
                "--trainer.precision=bf16-mixed", "--data.init_args.bit_depth=12")  # fmt: skip
    model = load_run(run_of(project))
    assert (model.preparation.mean, model.preparation.bit_depth) == ((0.4, 0.5, 0.6), 12)
    scores, _ = predicted(project, data_root / "bolt" / "test", run_of(project))
    own = model(list(scores.index)).image_scores
    np.testing.assert_allclose(own.numpy(), scores.to_numpy(), rtol=1e-2)  # bfloat16 has eight bits
    model.precision = "32-true"
    assert not torch.equal(model(list(scores.index)).image_scores, own), "mixed precision was followed"


def test_a_record_of_an_earlier_version_loads(trained, tmp_path, data_root):
    """Its optimiser is named in words of that time."""
    results = tmp_path / "results"
    run = results / "runs" / "single" / "first"
    shutil.copytree(run_of(trained), run)
    config = yaml.safe_load((EARLIER / "config.yaml").read_text())
    _replace(run, "config.yaml", yaml.safe_dump(config))
    scores = load_run(run, EARLIER / "last.ckpt")
    then = pd.read_csv(EARLIER / "image_scores.csv")
    table = pd.read_csv(run / "image_scores.csv")
    paths = table.set_index("id").path[then.id].tolist()
    assert scores(paths).image_scores.tolist() == pytest.approx(then.image_score.tolist(), rel=1e-4)


def _replace(run: Path, name: str, text: str) -> None:
    """Puts another file into a record, with its checksum."""
    (run / name).write_text(text)
    record = json.loads((run / "record.json").read_text())
    record["files"][name] = hashlib.sha256(text.encode()).hexdigest()
    (run / "record.json").write_text(json.dumps(record))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_file(project, tmp_path):
    """A run whose backbone's weights were a file, at tmp_path/weights/backbone.pth."""
    from models.backbones import BackboneConfig, FeatureExtractor

    extractor = FeatureExtractor(BackboneConfig("test_efficientnet.r160_in1k", (1, 2, 3, 4), "random", seed=7))
    (tmp_path / "weights").mkdir()
    torch.save(extractor.net.state_dict(), tmp_path / "weights" / "backbone.pth")
    project.run(f"--model.init_args.backbone.weights={tmp_path / 'weights' / 'backbone.pth'}", "--trainer.max_epochs=1")
    return project


def test_a_backbone_from_a_file_is_known_by_its_content_and_found_beside_the_run(
    with_file, tmp_path, data_root, photograph
):
    run, file = run_of(with_file), tmp_path / "weights" / "backbone.pth"
    before = load_run(run)(photograph).image_scores
    moved = file.rename(tmp_path / "moved.pth")
    with pytest.raises(FileNotFoundError, match=r"backbone\.pth.*give its path as backbone_file"):
        load_run(run)
    assert torch.equal(load_run(run, backbone_file=moved)(photograph).image_scores, before)
    shutil.copy(moved, with_file.results / "work" / "single" / "first" / "backbone.pth")
    assert torch.equal(load_run(run)(photograph).image_scores, before)
    scores, _ = predicted(with_file, data_root / "bolt" / "test", run)
    assert scores[str(photograph)] == pytest.approx(before.item(), rel=1e-5)
    torch.save({"conv_stem.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not the file of the run's backbone"):
        load_run(run, backbone_file=file)


def test_weights_that_are_not_in_timms_cache_are_asked_for_and_not_downloaded(trained, tmp_path, monkeypatch):
    run = tmp_path / "results" / "runs" / "single" / "first"
    shutil.copytree(trained.results, tmp_path / "results")
    text = (run / "record.json").read_text()
    (run / "record.json").write_text(text.replace('"weights": "random"', '"weights": "imagenet"'))
    monkeypatch.setattr("models.backbones.hub_answers", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=r"not in timm's cache.*nothing is downloaded"):
        load_run(run)


def test_a_source_of_weights_that_no_record_has_is_refused(trained, tmp_path):
    run = tmp_path / "results" / "runs" / "single" / "first"
    shutil.copytree(trained.results, tmp_path / "results")
    text = (run / "record.json").read_text()
    (run / "record.json").write_text(text.replace('"weights": "random"', '"weights": "auto"'))
    with pytest.raises(ValueError, match="has weights 'auto'; known are imagenet, packaged, random and file"):
        load_run(run)


def test_the_recorded_source_counts_and_not_what_auto_would_find_now(project, monkeypatch, photograph):
    monkeypatch.setattr("models.backbones.resolve_auto", lambda name: "random")
    project.run("--model.init_args.backbone.weights=auto", "--trainer.max_epochs=1")
    monkeypatch.setattr("models.backbones.resolve_auto", lambda name: pytest.fail("auto was asked"))
    assert load_run(run_of(project))(photograph).image_scores.isfinite().all()


def test_packaged_weights_are_found_in_their_package(project, monkeypatch, data_root):
    monkeypatch.setenv("BACKBONE", "tf_efficientnet_lite0.in1k")
    monkeypatch.setenv("WEIGHTS", "packaged")
    project.run("--trainer.max_epochs=1")
    for variable in ("BACKBONE", "WEIGHTS"):
        monkeypatch.delenv(variable)
    assert load_run(run_of(project)).preparation.mean == (127 / 255,) * 3
    assert_scores_are_those_of_predict(project, data_root / "bolt" / "test", run_of(project))


def test_the_checkpoint_may_lie_anywhere_and_its_absence_is_said(trained, tmp_path, photograph):
    run = tmp_path / "elsewhere" / "runs" / "single" / "first"
    shutil.copytree(run_of(trained), run)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not exist: the weights of .* are needed"):
        load_run(run)
    model = load_run(run, checkpoint=trained.checkpoint())
    assert torch.equal(model(photograph).maps, load_run(run_of(trained))(photograph).maps)
    alone = Path(tempfile.mkdtemp(dir="/tmp"))  # a record need not lie among others
    shutil.copytree(run, alone, dirs_exist_ok=True)
    assert load_run(alone, checkpoint=trained.checkpoint())(photograph).image_scores.isfinite().all()
    shutil.rmtree(alone)
    with pytest.raises(FileNotFoundError, match=r"other\.ckpt does not exist"):
        load_run(run, checkpoint=tmp_path / "other.ckpt")


def test_another_networks_checkpoint_is_refused_in_a_sentence(trained, tmp_path):
    content = torch.load(trained.checkpoint(), weights_only=True)
    del content["state_dict"]["network.input_projection.weight"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt does not hold the weights of"):
        load_run(run_of(trained), checkpoint=tmp_path / "other.ckpt")


# ---- a record is data ------------------------------------------------------------------------------------------------


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_of_a_foreign_record_or_checkpoint_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.results, tmp_path / "results")
    run = tmp_path / "results" / "runs" / "single" / "first"
    torch.save({"state_dict": {}, "more": _Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="classes beyond tensors"):
        load_run(run, checkpoint=tmp_path / "trap.ckpt")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for path in ("os.system", "pathlib.Path", "lightning_modules.base.ReconstructionModule", "torch.optim.Adam"):
        config["model"]["class_path"] = path
        _replace(run, "config.yaml", yaml.safe_dump(config))
        with pytest.raises(ValueError, match=r"names the class|cannot be made"):
            load_run(run)
    config["model"] = "lightning_modules.uniad.UniAD"
    _replace(run, "config.yaml", yaml.safe_dump(config))
    with pytest.raises(ValueError, match="does not describe a model"):
        load_run(run)
    assert not (tmp_path / "ran").exists()


def test_an_optimiser_of_the_users_own_is_not_needed(trained, tmp_path, photograph):
    shutil.copytree(trained.results, tmp_path / "results")
    run = tmp_path / "results" / "runs" / "single" / "first"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["optimizer"] = {"class_path": "not.here.Optimizer", "init_args": {}}
    _replace(run, "config.yaml", yaml.safe_dump(config))
    assert load_run(run)(photograph).image_scores.isfinite().all()


# ---- images that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(4, 8, 8), r"image 0 is a tensor of shape \(4, 8, 8\); give \(3, H, W\)"),
        (torch.full((3, 8, 8), 2.0), r"values from 2 to 2; floats are in \[0, 1\], not normalised"),
        (torch.full((3, 8, 8), float("nan")), r"values from nan to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"image 0 is torch.int64; give uint8"),
        ([torch.zeros(3, 8, 8), np.zeros((8, 8, 3))], r"image 1 is a ndarray; give a tensor"),
        ([], "No image is given"),
        ("/nowhere/photo.png", r"/nowhere/photo\.png: cannot be read"),
    ],
)
def test_what_is_no_image_is_named_with_what_is_allowed(model, image, message):
    with pytest.raises(DataError, match=message):
        model(image)


def test_the_package_says_what_it_does_not_have():
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        _ = lightning_modules.load_runs
