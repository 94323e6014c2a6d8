"""What to type where no trained weights of a backbone are at hand and random ones were not asked for."""

from __future__ import annotations


def no_weights(name: str) -> str:
    """The sentence, for a timm model."""
    return (
        f"No ImageNet weights of {name} are at hand: timm's cache has none, its hub delivers none and no Python package has "
        "them. For your own photographs use BACKBONE=tf_efficientnet_lite0.in1k WEIGHTS=packaged, which needs no hub, or a "
        "file (WEIGHTS=<path>); WEIGHTS=random insists on random features."
    )
