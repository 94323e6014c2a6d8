"""The categories of the embedded benchmark and the defects that occur on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datamodules.synthetic import objects, textures
from datamodules.synthetic.scene import Scene

MISSING, EXTRA, MISPLACED = LOGICAL = ("missing_part", "extra_part", "misplaced_part")


@dataclass(frozen=True)
class Category:
    """How to draw a scene of a category, and which defects it can have."""

    draw: Callable[[np.random.Generator], Scene]
    structural: tuple[str, ...]
    logical: tuple[str, ...] = ()

    @property
    def defects(self) -> tuple[str, ...]:
        return self.structural + self.logical


CATEGORIES: dict[str, Category] = {
    "bottle_cap": Category(objects.bottle_cap, ("dent", "scratch", "smear"), (MISPLACED,)),
    "cable": Category(objects.cable, ("hole", "burn", "tear"), (MISSING, MISPLACED)),
    "circuit_board": Category(objects.circuit_board, ("scratch", "burn", "contamination"), LOGICAL),
    "fabric": Category(textures.fabric, ("hole", "stain", "contamination", "burn")),
    "gasket": Category(objects.gasket, ("tear", "contamination", "chip"), LOGICAL),
    "gear": Category(objects.gear, ("chip", "corrosion", "scratch"), (MISSING, EXTRA)),
    "pill_tray": Category(objects.pill_tray, ("crack", "stain", "contamination"), LOGICAL),
    "steel_plate": Category(objects.steel_plate, ("scratch", "dent", "corrosion"), LOGICAL),
    "tiles": Category(textures.tiles, ("crack", "chip", "stain", "contamination")),
    "wood": Category(textures.wood, ("scratch", "crack", "hole", "stain")),
}
