"""Methods that reconstruct features, and `load_run`, which gives a finished run's model back.

from lightning_modules import load_run

model = load_run("results/runs/single/mine")
scored = model(["new.png"])  # scored.image_scores (B,), scored.maps (B, H, W)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.running.loading import load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """Imports on first use: the program listens to signals before anything heavy is imported."""
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_modules.running.loading import load_run

    return load_run
