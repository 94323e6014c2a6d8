"""Configurations that earlier versions wrote, in the words of this one."""

from __future__ import annotations

from typing import Any

OPTIMIZERS = {"adam": "torch.optim.Adam", "adamw": "torch.optim.AdamW"}
SCHEDULE = "torch.optim.lr_scheduler.MultiStepLR"


def translated(configuration: Any) -> Any:
    """A configuration as loaded from a file; a model's `optimizer: {name, lr, ..., lr_drops, lr_gamma}` is rewritten.

    What is not of that form is returned as it is.
    """
    try:
        arguments = configuration["model"]["init_args"]
        options = dict(arguments["optimizer"])
    except (TypeError, KeyError, ValueError):
        return configuration
    name, drops = options.pop("name", None), options.pop("lr_drops", None)
    gamma = options.pop("lr_gamma", 0.1)
    if options == arguments["optimizer"]:
        return configuration
    arguments = {**arguments, "optimizer": options}
    if name is not None:
        init_args = {"lr": 1e-4, **options, "fused": True}
        arguments["optimizer"] = {"class_path": OPTIMIZERS.get(name, name), "init_args": init_args}
    if drops is not None:
        schedule = {"class_path": SCHEDULE, "init_args": {"milestones": drops, "gamma": gamma}}
        arguments["lr_scheduler"] = schedule if drops else None
    return {**configuration, "model": {**configuration["model"], "init_args": arguments}}
