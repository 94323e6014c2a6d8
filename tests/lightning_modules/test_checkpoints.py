"""A damaged checkpoint costs the time since the one before it, and is named in a sentence."""

from __future__ import annotations

import os
import signal

import pandas as pd
import pytest
import torch

from lightning_modules.callbacks.scoring import Evaluation
from lightning_modules.running import checkpoints


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_root, make_project):
    project = make_project(tmp_path_factory.mktemp("whole"), data_root)
    torch.set_num_threads(1)
    project.run("--trainer.max_epochs=4")
    return project


@pytest.fixture(scope="module")
def stopped():
    """The interrupted project, once a test has made it."""
    return []


@pytest.fixture
def interrupted(stopped, project, cut_off, tmp_path_factory):
    """A project whose run stopped at the start of its fourth epoch."""
    if not stopped:
        cut_off(project, "--trainer.max_epochs=4", at=3)
        stopped.append(project)
    return stopped[0].copied(tmp_path_factory.mktemp("copy"))


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "cut": (_cut, "cut off or damaged"),
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "text": (lambda file: file.write_text("hello, this is text"), "torch did not save it"),
    "foreign": (lambda file: torch.save({"weights": torch.zeros(2)}, file), "lacks state_dict and trained_epochs"),
    "tensor": (lambda file: torch.save(torch.zeros(2), file), "holds a Tensor"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(interrupted, uninterrupted, caplog, damage):
    spoil, what = DAMAGES[damage]
    spoil(interrupted.checkpoint())
    with caplog.at_level("INFO"):
        interrupted.run("--trainer.max_epochs=4")
    output = caplog.text
    assert what in output
    assert checkpoints.PREVIOUS in output
    pd.testing.assert_frame_equal(interrupted.record().metrics, uninterrupted.record().metrics)
    pd.testing.assert_frame_equal(interrupted.record().history, uninterrupted.record().history)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_without_another_is_refused_in_a_sentence(interrupted, damage):
    spoil, what = DAMAGES[damage]
    spoil(interrupted.checkpoint())
    interrupted.checkpoint().with_name(checkpoints.PREVIOUS).unlink()
    with pytest.raises(SystemExit) as caught:
        interrupted.run("--trainer.max_epochs=4")
    assert what in caught.value.code
    assert "last.ckpt" in caught.value.code
    assert "Delete it to begin anew" in caught.value.code
    assert "weights_only" not in caught.value.code
    assert "\n" not in caught.value.code


def test_sigterm_during_the_evaluation_leaves_at_once_and_the_run_is_only_scored_again(
    project, uninterrupted, monkeypatch
):
    batches = []

    def ask(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        batches.append(batch_idx)
        os.kill(os.getpid(), signal.SIGTERM)

    more = "--trainer.max_epochs=4", "--data.init_args.eval_batch_size=2"
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "on_test_batch_end", ask)
        with pytest.raises(SystemExit) as left:
            project.run(*more)
    assert left.value.code == 143
    assert batches == [0]
    assert not (project.results / "runs" / "single" / "first").exists()
    project.run(*more)
    pd.testing.assert_frame_equal(project.record().history, uninterrupted.record().history)
    pd.testing.assert_frame_equal(project.record().metrics, uninterrupted.record().metrics)
