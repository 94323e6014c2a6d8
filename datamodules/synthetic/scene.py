"""What a category of the embedded benchmark is: a background, parts that can be missing, added or misplaced, a lamp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from datamodules.synthetic.canvas import Canvas, Light

Draw = Callable[[Canvas, "Part", np.random.Generator], None]


@dataclass(frozen=True)
class Part:
    """One thing in a scene: where it lies, how it is turned, and the function that draws it.

    `seed` feeds the part's own generator, so that a part looks the same whatever happens to the others.
    """

    kind: str
    draw: Draw
    x: float
    y: float
    angle: float
    scale: float
    seed: int
    colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    removable: bool = True

    def render(self, canvas: Canvas) -> None:
        self.draw(canvas, self, np.random.default_rng(self.seed))


@dataclass(frozen=True)
class Scene:
    """A layout that can be rendered again and again to the same pixels, as it is or with an edit."""

    background: Callable[[Canvas, np.random.Generator], None]
    seed: int
    light: Light
    parts: tuple[Part, ...] = ()
    spare: tuple[Part, ...] = ()
    """Parts that an "extra part" adds one of."""
    swaps: tuple[tuple[int, Part], ...] = ()
    """(index of a part, what it becomes) that a "misplaced part" applies one of."""

    def render(self, n: int) -> Canvas:
        canvas = Canvas(n)
        self.background(canvas, np.random.default_rng([self.seed, 1]))
        for part in self.parts:
            part.render(canvas)
        return canvas

    def edited(self, defect: str, rng: np.random.Generator) -> Scene:
        """The scene with a logical defect: missing_part, extra_part or misplaced_part."""
        parts = list(self.parts)
        if defect == "missing_part":
            del parts[int(rng.choice([i for i, part in enumerate(parts) if part.removable]))]
        elif defect == "extra_part":
            parts.append(self.spare[int(rng.integers(len(self.spare)))])
        elif defect == "misplaced_part":
            index, other = self.swaps[int(rng.integers(len(self.swaps)))]
            parts[index] = other
        else:
            raise ValueError(f"{defect!r} is not a logical defect.")
        return replace(self, parts=tuple(parts))


def draw_light(rng: np.random.Generator, azimuth: float = -2.2, spread: float = 0.25, **fixed: float) -> Light:
    """A lamp that stays in its corner but is never quite the same: direction, exposure, white balance, focus, noise."""
    warm = float(rng.normal(0, 0.012))
    return Light(
        azimuth=azimuth + float(rng.normal(0, spread)),
        elevation=fixed.get("elevation", 0.9) + float(rng.normal(0, 0.05)),
        ambient=fixed.get("ambient", 0.5) + float(rng.normal(0, 0.02)),
        exposure=fixed.get("exposure", 1.0) * float(np.exp(rng.normal(0, 0.05))),
        tint=(1 + warm, 1.0, 1 - warm),
        vignette=0.16 + 0.05 * float(rng.random()),
        falloff=0.07 + 0.05 * float(rng.random()),
        focus=0.45 + 0.25 * float(rng.random()),
        noise=0.009 + 0.006 * float(rng.random()),
    )


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for a generator of its own."""
    return int(rng.integers(2**31))
