"""The options that buy speed keep the numbers."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch

from datamodules.synthetic import Plan, generate
from lightning_modules.benchmarks import training as benchmark
from lightning_modules.callbacks.compile import Compile
from lightning_modules.uniad import UniAD


def test_bfloat16_training_has_float32_losses_and_nearly_the_same_course(project, trained, monkeypatch):
    kinds = set()
    original = UniAD.loss

    def loss(self, pairs):
        value = original(self, pairs)
        kinds.add((pairs[0].reconstruction.dtype, value.dtype))
        return value

    monkeypatch.setattr(UniAD, "loss", loss)
    record = project.fit("--trainer.precision=bf16-mixed", name="bfloat16")
    assert kinds == {(torch.bfloat16, torch.float32)}
    assert record.record.provenance["precision"] == "bf16-mixed"
    np.testing.assert_allclose(project.losses("bfloat16"), trained.losses(), rtol=0.02)


@pytest.mark.program
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_and_scores_like_an_uncompiled_one(project):
    exact = "--model.init_args.dropout=0", "--model.init_args.jitter_scale=0"
    project.fit(*exact, name="plain")
    project.fit(*exact, "--run.compile=true", name="compiled")
    np.testing.assert_allclose(project.losses("compiled"), project.losses("plain"), rtol=1e-4)
    values = [project.record(name).metrics.value for name in ("plain", "compiled")]
    np.testing.assert_allclose(*values, atol=1e-2)
    assert not [name for name in project.weights("compiled") if "_orig_mod" in name]


def test_compiling_without_a_compiler_is_refused_at_once(project, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match="C\\+\\+ compiler"):
        project.fit("--run.compile=true", name="refused")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_cuda_graphs_are_refused_where_they_cannot_be(project):
    with pytest.raises(SystemExit, match=r"needs run\.compile=true"):
        project.fit("--run.cuda_graphs=true", name="uncompiled")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, but this run is on cpu"):
        project.fit("--run.cuda_graphs=true", "--run.compile=true", "--trainer.accelerator=cpu", name="cpu")


@pytest.fixture(scope="module")
def wood(tmp_path_factory):
    """A drawn benchmark of one category."""
    plan = Plan(size=64, train=20, test=1, defects=1, categories=("wood",))
    return generate(tmp_path_factory.mktemp("data"), plan, workers=1)


@pytest.mark.parametrize(
    "method",
    [
        "uniad",
        *(pytest.param(m, marks=pytest.mark.program) for m in ("identical_shortcut", "unias", "rlr", "ulsad", "dfr")),
    ],
)
def test_what_is_compiled_is_what_a_step_of_the_method_computes(method, wood, tmp_path, monkeypatch):
    """A part whose forward pass no step calls would be compiled in vain."""
    calls = {}

    def compile_with_a_counter(part, mode=None):
        calls[part] = 0
        original = part.forward

        def forward(*inputs):
            calls[part] += 1
            return original(*inputs)

        part.forward = forward

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_a_counter)
    module, make, _ = benchmark.prepare(method, benchmark.Options(), wood)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainer, about data loaders
        trainer = benchmark._trainer(str(tmp_path), Compile(), max_epochs=1, limit_train_batches=1)
        trainer.fit(module, datamodule=make())
    assert calls
    assert all(calls.values())
