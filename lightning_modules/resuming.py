"""An interrupted run goes on only as what it began as."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.callbacks import write_json
from lightning_modules.run import RunConfig

BEGAN_AS = "began_as.json"
# The options that decide what is trained. Those of the backbone's weights are compared by their hash, data by its content.
_DECIDES = re.compile(
    r"(model|data\.init_args|seed_everything|run\.(protocol|selection)|"
    r"trainer\.(precision|gradient_clip_\w+|accumulate_grad_batches|limit_train_batches))(\.|$)"
)
_FREE = re.compile(
    r"model\.init_args\.backbone\.weights|"
    r"data\.init_args\.(num_workers|eval_batch_size|cache_mb|predict_root|datasets\.\d+\.(root|categories.*))$"
)


def check(run: RunConfig, configuration: Mapping[str, Any], fingerprint: str, left: Path) -> None:
    """Refuses to go on with an interrupted run that began with other options or on other data; else notes these.

    Args:
        run: The run. With ``overwrite`` it begins anew instead.
        configuration: Its complete configuration.
        fingerprint: Of its data.
        left: The file or folder that an interrupted run goes on from.

    Raises:
        SystemExit: the run began as something else; the message names what differs.
    """
    now = {key: value for key, value in _flat("", configuration) if _DECIDES.match(key) and not _FREE.match(key)}
    now = json.loads(json.dumps({**now, "fingerprint of the data": fingerprint[:12]}, default=str))
    file = run.work / BEGAN_AS
    if left.exists() and file.is_file():
        then = json.loads(file.read_text())
        keys = sorted(key for key in then | now if then.get(key) != now.get(key))
        if keys and not run.overwrite:
            lines = [f"  {key}: {then.get(key)} then, {now.get(key)} now" for key in keys[:6]]
            lines += [f"  and {len(keys) - 6} more"] * (len(keys) > 6)
            raise SystemExit(
                "\n".join([f"{run.work} holds an interrupted run that began otherwise:", *lines])
                + "\nGo on with what it began with, choose another --run.name, or begin anew with --run.overwrite=true."
            )
        if keys:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    rank_zero_only(write_json)(file, now)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings and of lists of mappings."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), part)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _flat(f"{prefix}.{number}", part)
    else:
        yield prefix, value
