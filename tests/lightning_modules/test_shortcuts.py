"""One decoder for all networks of the study, and rows of self-similarity of the frozen features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lightning_modules.pictures import self_similarity, shortcuts
from models.ulsad import feature_attention

BACKBONE = {"name": "test_efficientnet.r160_in1k", "levels": [1, 2, 3, 4], "weights": "random", "padding": "default"}


@pytest.fixture
def study(project, monkeypatch):
    """Two networks of the study, two epochs each, as cells of its sweep."""
    project.use("identical_shortcut.IdenticalShortcut", image_size=64, hidden=120, grid=[4, 4], backbone=BACKBONE)
    for network in ("cnn", "mlp"):
        monkeypatch.setattr(
            "lightning_modules.running.recording.sweep_parameters", lambda n=network: {shortcuts.NETWORK: n}
        )
        options = (f"--model.init_args.network={network}", "--run.sweep=identical_shortcut", "--run.keep_epochs=[1]")
        project.run(*options, name=network)
    return project


@pytest.mark.program  # trains the networks of a sweep, and a decoder
def test_all_networks_are_shown_early_and_late_by_one_decoder(study, capsys):
    arguments = [f"--results={study.results}", "--epochs=1", "--width=16"]
    shortcuts.main(arguments)
    said = capsys.readouterr().out
    assert "Cost: 2 steps of " in said
    assert "No early weights" not in said
    picture = study.results / "figures" / "identical_shortcut_decoded.jpg"
    width, height = Image.open(picture).size
    assert 2.6 < width / height < 3.8  # seven columns, two rows
    found = shortcuts.networks(study.results / "runs", "identical_shortcut", 0)
    moments = [moment for name, stored in found.items() for moment in shortcuts.moments(name, stored)]
    assert [(moment.network, moment.epoch) for moment in moments] == [("cnn", 1), ("cnn", 2), ("mlp", 1), ("mlp", 2)]
    early, late = (dict(moment.module.network.named_parameters()) for moment in moments[2:])
    assert any(not torch.equal(early[name], late[name]) for name in early), "early weights are the late ones"
    decoders = list((study.results / "work").rglob("visual_decoder/last.ckpt"))
    assert len(decoders) == 1, "one decoder for all"
    shortcuts.main(arguments)
    assert "Cost" not in capsys.readouterr().out


def test_a_sweep_without_the_study_is_told(trained):
    with pytest.raises(SystemExit, match=r"no run of seed 0 with a parameter model\.init_args\.network"):
        shortcuts.main([f"--results={trained.results}", "--sweep=single"])


def test_a_row_of_attention_is_what_eq_3_weighs_a_position_with():
    features = torch.randn(1, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    row = self_similarity.similarity_row(features[0], (0.5, 0.5))  # position (1, 2)
    assert row.sum() == pytest.approx(1)
    # Eq. 3 makes of every position the mean of all of them with these weights.
    expected = feature_attention(features, features)[0, :, 1, 2]
    assert torch.allclose((features[0] * row).sum((1, 2)), expected, atol=1e-6)
    cosine = self_similarity.similarity_row(features[0], (0.5, 0.5), "cosine")
    assert cosine[1, 2] == pytest.approx(1)
    assert cosine[0, 0] == pytest.approx(float(F.cosine_similarity(features[0, :, 0, 0], features[0, :, 1, 2], dim=0)))


def test_the_middle_of_a_defect_is_on_the_defect():
    ring = np.zeros((20, 20), bool)
    ring[5:15, 5:15] = True
    ring[7:13, 7:13] = False
    row, column = self_similarity.middle(ring)
    assert ring[int(row * 20), int(column * 20)]


@pytest.mark.program
def test_a_run_is_pictured_with_a_row_per_position_and_a_column_per_level(trained):
    self_similarity.main([str(trained.results / "runs" / "single" / "first")])
    picture = trained.results / "work" / "single" / "first" / "self_similarity.png"
    width, height = Image.open(picture).size
    assert 1.0 < width / height < 1.5  # five columns, four rows
