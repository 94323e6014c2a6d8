"""Command lines equal those of W&B's agent, letter for letter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from wandb.sdk.launch.sweeps import utils as wandb_utils

from sweeps.runner import checked_sweep, command
from sweeps.runner.errors import SweepError

PARAMETERS = {
    "model.init_args.levels": [4, 3, 2, 1],
    "model.init_args.mask_places": ["encoder", "decoder1"],
    "model.init_args.rate": 1e-05,
    "model.init_args.flag": True,
    "model.init_args.other": False,
    "model.init_args.text": "a b",
    "model.init_args.none": "null",
    "seed_everything": 0,
}


def of_agent(words: list[str], parameters: dict[str, Any]) -> list[str]:
    """What wandb's agent starts, with its own macro code; its loop over the words is repeated here."""
    filled = wandb_utils.create_sweep_command(list(words))
    macros = wandb_utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in parameters.items()}})
    macros |= {"interpreter": ["python"], "env": ["/usr/bin/env"]}
    result: list[str] = []
    for word in filled:
        result += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return result


@pytest.mark.parametrize("macro", ["args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags", "args_json"])
@pytest.mark.parametrize("profile", ["paper", None])
def test_command_line_equals_the_agents(macro: str, profile: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {} if profile is None else {"PROFILE": profile}
    monkeypatch.delenv("PROFILE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ["${env}", "-u", "SLURM_PROCID", "${interpreter}", "-m", "x", "p/${envvar:PROFILE}/${envvar:PROFILE}.yaml"]
    words.append(f"${{{macro}}}")
    ours = command.expand(tuple(words), PARAMETERS, "python", variables)
    assert ours == of_agent(words, PARAMETERS)


@pytest.mark.parametrize("name", checked_sweep.names())
def test_every_cell_of_every_shipped_sweep_starts_like_under_the_agent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROFILE", "demo")
    sweep = checked_sweep.load(name)
    for cell in sweep.cells(seeds=[0, 1]):
        ours = command.expand(sweep.command, cell.parameters, "python", {"PROFILE": "demo"})
        assert ours == of_agent(list(sweep.command), cell.parameters)
        assert f"--run.sweep={name}" in ours


def test_shipped_sweeps_are_there() -> None:
    assert {"uniad_components", "neighbor_mask", "feature_jitter", "identical_shortcut"} <= set(checked_sweep.names())


def test_misspelt_macro_is_an_error_and_not_dropped() -> None:
    with pytest.raises(SweepError, match="Did you mean 'args'"):
        command.expand(("${interpreter}", "${arg}"), {}, sys.executable, {})
