"""MKD's module: maps that need gradients in every command, its two readings of a map, and pixels in [0, 1]."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_modules.mkd import MKD
from lightning_modules.running.command_line import main
from lightning_modules.running.loading import load_run
from models.backbones import BackboneConfig

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [2, 3, 4], "weights": "random", "padding": "default"}


def configured(project, method: str = "mkd", **options):
    return project.use("mkd.MKD", backbone=BACKBONE, image_size=64, **options)


@pytest.fixture
def make(project):
    """A project of MKD with further arguments of its model."""
    return partial(configured, project)


@pytest.fixture
def trained(trained_once):
    return trained_once("mkd", configured)


def module(**options) -> MKD:
    torch.manual_seed(0)
    return MKD(BackboneConfig(**BACKBONE), image_size=64, **options).eval()


def test_fit_test_and_predict_make_maps_and_leave_the_source_alone(trained, data_root):
    project = trained
    record = project.record()
    assert record.metrics[record.metrics.metric == "pixel_auroc"].value.notna().all()
    assert set(record.metrics.variant.fillna("")) == {""}  # nothing stretched per image
    assert any("not stretched per image" in note for note in record.record.notes)
    assert any("pixels in [0, 1]" in note for note in record.record.notes)
    project.run(f"--ckpt_path={project.checkpoint()}", "--run.heatmaps=true", command="test", name="again")
    assert len(project.record("again").heatmaps)
    assert record.metrics.value.tolist() == pytest.approx(project.record("again").metrics.value.tolist(), nan_ok=True)
    images = f"--data.init_args.predict_root={data_root / 'bolt' / 'test'}"
    project.run(images, command="predict")
    maps = list((project.results / "work" / "single" / "first" / "predictions").glob("*.npy"))
    assert len(maps) == 5
    assert all(np.load(path).max() > 0 for path in maps)


def test_as_released_the_map_is_stretched_and_opened_and_the_record_says_so(make):
    record = make().fit("--run.protocol=as_released")
    assert set(record.metrics.variant.fillna("")) == {"", "map=unstretched"}
    assert any("stretched to [0, 1] on its own" in note and "leaves normal" in note for note in record.record.notes)


@pytest.mark.parametrize("kind", ["gradients", "gbp", "smooth_grad"])
def test_an_images_map_and_score_do_not_depend_on_its_batch(kind):
    net = module(map=kind, smooth_draws=2)
    net.set_protocol("as_released", "last")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = net.evaluate({"image": images})
        alone = [net.evaluate({"image": images[b : b + 1]}) for b in range(3)]
    for name, found in together.items():
        assert found.maps.shape == (3, 64, 64)
        torch.testing.assert_close(found.maps, torch.cat([one[name].maps for one in alone]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.image_scores, torch.cat([one[name].image_scores for one in alone]))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_both_networks_see_the_pixels_whatever_the_data_are_normalised_with(trained):
    project = trained
    given = ["--data.init_args.mean=[0.1,0.2,0.3]", "--data.init_args.std=[0.5,0.4,0.3]"]
    with pytest.warns(UserWarning, match="normalised with mean"):
        project.run(*given, f"--ckpt_path={project.checkpoint()}", command="test", name="given")
    first, second = (project.record(name).metrics.value.to_numpy() for name in ("first", "given"))
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_a_loaded_run_recovers_pixels_with_its_own_mean_and_std(make):
    with pytest.warns(UserWarning, match="normalised with mean"):
        record = make().fit("--data.init_args.mean=[0.1,0.2,0.3]", "--data.init_args.std=[0.5,0.4,0.3]")
    tested = pd.read_csv(record.path / "image_scores.csv")
    loaded = load_run(record.path)(tested.path.tolist())
    np.testing.assert_allclose(loaded.image_scores.numpy(), tested.image_score, rtol=1e-4)


def test_features_are_cached_where_the_source_sees_the_normalised_pixels_and_change_nothing(make, capsys):
    project = make(input="backbone")
    project.fit(name="cached")
    assert "No feature cache" not in capsys.readouterr().out
    project.fit("--cache.mode=off", name="uncached")
    assert project.losses("cached") == pytest.approx(project.losses("uncached"), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "imagenet"}, "unit, backbone"),
        ({"map": "integrated"}, "gradients, gbp, smooth_grad"),
        ({"magnitude_weight": -1.0}, "negative"),
        ({"smooth_draws": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)
    with pytest.raises(ValueError, match="multiples of 16"):
        MKD(BackboneConfig(**BACKBONE), image_size=72)


@pytest.mark.program
def test_a_file_of_a_cloner_with_biases_is_not_imported_without_them(make, tmp_path):
    project = make()
    torch.save(module(bias=True).network.state_dict(), tmp_path / "Cloner.pth")
    arguments = ["import", "--method=mkd", f"--checkpoint={tmp_path / 'Cloner.pth'}", f"--config={project.config}"]
    with pytest.raises(SystemExit, match="bias=true"):
        main([*arguments, "--run.name=theirs", "--trainer.logger=false"])
    main([*arguments, "--run.name=theirs", "--trainer.logger=false", "--model.init_args.bias=true"])
