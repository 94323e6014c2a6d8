"""Standardised features: what the network gets has mean 0 and deviation 1 over the training images, for ever after."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from lightning_modules.base import ReconstructionModule
from lightning_modules.destseg import DeSTSeg
from lightning_modules.ulsad import ULSAD
from models.backbones import BackboneConfig

OPTION = "--model.init_args.backbone.standardised=true"


@pytest.mark.parametrize("cache", ["float32", pytest.param("off", marks=pytest.mark.program)])
def test_training_features_have_mean_zero_and_deviation_one_by_statistics_that_come_with_the_checkpoint(
    project, monkeypatch, cache
):
    seen = []
    original = ReconstructionModule.features

    def features(self, batch):
        levels = original(self, batch)
        if self.training:
            seen.extend(levels)
        return levels

    monkeypatch.setattr(ReconstructionModule, "features", features)
    record = project.fit(OPTION, "--trainer.max_epochs=1", f"--cache.mode={cache}")
    channels = torch.cat(seen).double().transpose(0, 1).flatten(1)
    varying = channels.std(1, correction=0) > 1e-6
    assert varying.any()
    torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        channels.std(1, correction=0)[varying], torch.ones(int(varying.sum())).double(), atol=1e-4, rtol=0
    )
    assert "feature channels standardised over the training images" in record.record.notes
    mode = f"--cache.mode={cache}"
    project.run(OPTION, mode, f"--ckpt_path={project.checkpoint()}", command="test", name="again")
    pd.testing.assert_frame_equal(project.record("again").metrics, record.metrics)


def test_a_method_that_standardises_by_itself_refuses_the_option():
    with pytest.raises(ValueError, match="ulsad standardises its features already"):
        ULSAD(BackboneConfig("resnet10t", (2, 3), weights="random", standardised=True), image_size=64)


def test_destseg_whose_student_cannot_follow_standardised_levels_refuses_them():
    with pytest.raises(ValueError, match="ends in ReLUs"):
        DeSTSeg(BackboneConfig("resnet10t", (2, 3, 4), weights="random", standardised=True), image_size=64)
