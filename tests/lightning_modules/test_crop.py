"""A run with a centre crop or with maps of another size says so in its record, and is another run than one without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_modules import load_run
from lightning_modules.callbacks.scoring import Evaluation
from results.common.deciding import deciding

CROP = "--data.init_args.crop_from=80"


@pytest.fixture(scope="module")
def cropped(make_project, data_root, tmp_path_factory):
    torch.set_num_threads(1)
    project = make_project(tmp_path_factory.mktemp("crop"), data_root)
    project.run("--trainer.max_epochs=1", CROP, name="cropped")
    return project


def test_record_names_the_crop_and_what_it_cuts_off(cropped):
    record = cropped.record("cropped").record
    assert record.resize == "pil_bilinear to 80x80, centre crop"
    assert record.image_size == (64, 64)
    (note,) = [note for note in record.notes if "margin" in note]
    assert "the centre of 64 x 64 of 80 x 80 pixels is kept" in note


def test_cached_and_computed_features_see_the_same_crop(cropped):
    cropped.run("--trainer.max_epochs=1", CROP, "--cache.mode=off", name="computed")
    assert cropped.losses("computed") == pytest.approx(cropped.losses("cropped"), rel=1e-5)
    cropped.run("--trainer.max_epochs=1", name="whole")
    assert cropped.losses("whole") != pytest.approx(cropped.losses("cropped"), rel=1e-3), "served from the crop's cache"


def test_predict_sees_the_crop_of_the_training(cropped):
    scores = cropped.results / "runs/single/cropped/image_scores.csv"
    config = cropped.results / "runs/single/cropped/config.yaml"
    assert "crop_from: 80" in config.read_text()
    import pandas as pd

    from lightning_modules.running.command_line import main

    images = cropped.data / "bolt" / "test"
    main(["predict", f"--config={config}", f"--data.init_args.predict_root={images}"])
    predicted = pd.read_csv(cropped.results / "work/single/cropped/predictions/scores.csv").set_index("image")
    tested = pd.read_csv(scores).set_index("path").image_score
    expected = tested[predicted.index].to_numpy()
    np.testing.assert_allclose(predicted.image_score.to_numpy(), expected, rtol=1e-5)
    loaded = load_run(config.parent)(list(predicted.index))
    np.testing.assert_allclose(loaded.image_scores.numpy(), expected, rtol=1e-5)


def test_crop_and_limits_of_au_pro_decide_a_result():
    for option in ({"data": {"init_args": {"crop_from": 448}}}, {"run": {"fpr_limits": [0.05]}}):
        assert deciding(option)


def test_masks_that_vanish_at_the_maps_size_are_counted():
    evaluation = Evaluation()
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    masks[0, 0, 0, 0] = True  # not where the centre of a 2 x 2 pixel is looked up
    masks[1, 0, :4, :4] = True
    evaluation._look_at_masks(masks, torch.zeros(3, 8, 8), [0, 1, 2])
    assert evaluation.notes() == []
    evaluation._look_at_masks(masks, torch.zeros(3, 2, 2), [0, 1, 2])
    assert evaluation.notes() == ["pixel metrics are measured at 2 x 2 pixels; 1 of 2 masks mark nothing there"]
