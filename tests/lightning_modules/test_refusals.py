"""What the command line refuses, it refuses in a line or two that say what to do."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_modules.running.command_line import main
from lightning_modules.uniad import UniAD


def _refusal(project, *more: str, command: str = "fit") -> str:
    with pytest.raises(SystemExit) as caught:
        project.run(*more, command=command)
    assert isinstance(caught.value.code, str)
    assert caught.value.code.count("\n") < 12
    return caught.value.code


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--model.init_args.neighbour_size=5", "neighbor_size"),
        ("--data.init_args.batchsize=4", "batch_size"),
        ("--run.protocl=clean", "run.protocol"),
        ("--model.init_args.backbone.weight_file=random", "weights"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_one(project, option, nearest):
    text = _refusal(project, option)
    assert option.split("=")[0].split(".")[-1] in text
    if nearest != "weights":
        assert f"Did you mean '{nearest}" in text


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.init_args.d_model=wide", "int"),
        ("--model.init_args.query=layer", "layerwise"),
        ("--run.protocol=dirty", "clean, as_released"),
        ("--cache.mode=float8", "float32, float16"),
        ("--model.init_args.neighbor_size=99", "hides everything|window"),
        ("--data.init_args.sampling=natura", "natural"),
        ("--data.init_args.tiles.size=0", "tiles.size is (0, 0); give whole numbers of at least 1."),
        ("--data.init_args.anomalies.opacity=x", "anomalies.opacity is 'x'; allowed are released, paper."),
        ("--model.init_args.optimizer.name=sgd", "Option 'name' is not accepted"),
        ("--model.init_args.optimizer=AdamV", "AdamV"),
        ("--model.init_args.optimizer.lr=-1", "learning rate"),
        ("--run.name=a/b", "names a folder"),
        ("--run.name=größe 1", "names a folder"),
        ("--seed_everything=false", "every run has a seed"),
        ("--data.init_args.image_size=32", "set --model.init_args.image_size"),
        ("--model.init_args.backbone.name=test_efficientne", "Did you mean test_efficientnet"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(project, option, expected):
    text = _refusal(project, option)
    assert any(part in text for part in expected.split("|")), text


def test_an_import_that_fails_in_a_constructor_is_told_with_its_reason(project, monkeypatch):
    def broken(self, *args, **kwargs):
        raise ImportError("libbroken.so: no such file")

    monkeypatch.setattr(UniAD, "__init__", functools.wraps(UniAD.__init__)(broken))
    assert "libbroken.so: no such file" in _refusal(project)


def test_an_unknown_category_is_answered_with_the_nearest_one(project, monkeypatch, data_root):
    monkeypatch.setenv("DATASET", "mvtec_ad")
    monkeypatch.setenv("DATA_ROOT", str(data_root))
    monkeypatch.setenv("CATEGORIES", "bold")
    assert "bolt" in _refusal(project)


def test_a_wrong_root_is_named(project, monkeypatch, tmp_path):
    monkeypatch.setenv("DATASET", "mvtec_ad")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    assert "nowhere" in _refusal(project)


def test_a_dataset_without_a_folder_is_refused(project, monkeypatch):
    monkeypatch.setenv("DATASET", "mvtec_ad")
    assert "one folder per dataset" in _refusal(project)


def test_a_missing_profile_is_named():
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config=sweeps/profiles/demo/no_such_method.yaml"])
    assert "no_such_method" in str(caught.value.code)


def test_a_weight_file_with_nan_is_refused(project, tmp_path):
    from models.backbones import BackboneConfig, FeatureExtractor

    extractor = FeatureExtractor(BackboneConfig("test_efficientnet.r160_in1k", (1, 2, 3, 4), "random"))
    state = extractor.net.state_dict()
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], torch.nan)
    torch.save(state, tmp_path / "broken.pth")
    text = _refusal(project, f"--model.init_args.backbone.weights={tmp_path / 'broken.pth'}")
    assert "NaN or infinity" in text
    assert "broken.pth" in text


def test_a_corrupt_image_is_named(tmp_path, write_data, make_project):
    project = make_project(tmp_path, write_data(tmp_path / "data"))
    victim = tmp_path / "data" / "disc" / "train" / "good" / "001.png"
    victim.write_bytes(victim.read_bytes()[:600])
    assert str(victim) in _refusal(project)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_scoring_without_trained_weights_is_refused(project, command, data_root):
    text = _refusal(project, f"--data.init_args.predict_root={data_root}", command=command)
    assert "needs trained weights" in text


def test_validation_without_held_out_images_is_refused(trained):
    with pytest.raises(SystemExit, match="nothing to validate on"):
        trained.run(command="validate")
