"""Parity with the released implementations: `@pytest.mark.parity("<method>")` runs a test once per recorded case.

The cases come from every cases*.json of the folder named by the environment variable PARITY_DIR, or of tests/models/parity, so
that other cases of the same form run through the same tests. With `having=<name>` only those run whose description, arrays or
hyperparameters have that name.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.head import AnomalyHead, HeadConfig

# The networks here are tiny: on a shared machine more threads only wait for each other.
torch.set_num_threads(1)

FULL_SIZE = {"destseg": "full", "hvqtrans": "full", "fcdd": "fcdd.vgg", "mkd": "mkd_full"}
"""Cases that `make test` leaves to `make test-all`: the same code runs in small ones."""
FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))


def fill(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The recorded runs' numbers: float32 standard normals that depend on the name alone."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(generator.standard_normal(tuple(shape)), dtype=np.float32))


def fill_parameter(name: str, shape: Sequence[int], gain: float = 1.5) -> torch.Tensor:
    """The usual rule for a network with batch normalisation: `gain` over the root of the inputs in weights of two and more
    dimensions, scales and variances near 1, shifts and means near 0."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    values = fill(name, shape)
    if values.ndim > 1:
        return gain * values / float(np.sqrt(np.prod(values.shape[1:])))
    if name.endswith("running_var"):
        return 1 + 0.1 * values.abs()
    return 0.05 * values + float(name.endswith("weight"))


def relative_error(found: Any, recorded: np.ndarray) -> float:
    """Largest error relative to the largest recorded value; `found` is a tensor or an array of the same shape."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == recorded.shape
    return float(np.abs(found - recorded).max() / max(np.abs(recorded).max(), 1e-30))


def assert_parity(found: torch.Tensor, recorded: np.ndarray, tolerance: float = 1e-4) -> None:
    error = relative_error(found, recorded)
    assert error <= tolerance, f"relative error {error:.2e}"


@dataclass(frozen=True, eq=False)
class ParityCase:
    """One recorded run; `description` is its entry in cases*.json, with `hparams` and `input`."""

    folder: Path
    description: Mapping[str, Any]
    fill = staticmethod(fill)
    fill_parameter = staticmethod(fill_parameter)
    error = staticmethod(relative_error)

    @property
    def method(self) -> str:
        return self.description["method"]

    @property
    def tag(self) -> str:
        return self.description["tag"]

    @property
    def key_prefix(self) -> str:
        return self.description["key_prefix"]

    @property
    def input(self) -> dict[str, Any]:
        return self.description["input"]

    @property
    def hparams(self) -> dict[str, Any]:
        return self.description["hparams"]

    def has(self, name: str) -> bool:
        return any(name in names for names in (self.description, self.description["arrays"], self.hparams))

    def input_tensor(self) -> torch.Tensor:
        return fill(self.input["name"], self.input["shape"])

    def layer_tokens(self) -> list[torch.Tensor]:
        """Tokens (B, N, C) of a frozen transformer's layers, each the input and half as much of its own."""
        name, shape = self.input["name"], self.input["shape"]
        return [fill(name, shape) + 0.5 * fill(f"{name}:{layer}", shape) for layer in range(self.hparams["layers"])]

    def key_shapes(self) -> dict[str, Any]:
        """Names and shapes of the released state dict, as <method>_keys.json has them."""
        return json.loads((self.folder / f"{self.method}_keys.json").read_text())

    def state(self, shapes: dict, rule: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The released state dict: rule(name, standard normals) for each of the shapes, under the case's prefix."""
        names = {self.key_prefix + name: shape for name, shape in shapes.items()}
        return {name: rule(name, fill(name, shape)) for name, shape in names.items()}

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The recorded arrays by name, read once; the empty name where the tag alone names one."""
        with np.load(self.folder / self.description["file"]) as stored:
            own = [name for name in stored.files if name == self.tag or name.startswith(f"{self.tag}.")]
            arrays = {name.removeprefix(self.tag).removeprefix("."): stored[name] for name in own}
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def tensor(self, name: str) -> torch.Tensor:
        """A copy, to be changed at will."""
        return torch.tensor(self.arrays[name])

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The recorded arrays whose names begin so, named by the rest."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)}

    def check(self, found: Mapping[str, Any], tolerance: float = 1e-4) -> None:
        """Compares what is recorded of `found`, each array to a part of its largest recorded value."""
        errors = {name: relative_error(ours, self.arrays[name]) for name, ours in found.items() if name in self.arrays}
        assert errors
        print(self.tag, {name: f"{error:.1e}" for name, error in errors.items()})
        assert max(errors.values()) <= tolerance, errors


def check_decoder(case, network, released_name, pairs, loss, **more) -> None:
    """Every recorded number of a decoder with Dinomaly's head: its pairs, maps, scores, loss and gradients."""
    h = case.hparams
    head = HeadConfig(
        distance="cosine",
        fusion="mean",
        map_size=h["evaluate"],
        smoothing_sigma=4.0,
        smoothing_kernel=5,
        smoothing_border="zeros",
        image_score="top_k",
        top_k_fraction=0.01,
    )
    unsmoothed, size = HeadConfig(distance="cosine", fusion="mean", image_score="max"), (h["image"],) * 2
    with torch.no_grad():
        scored = AnomalyHead(head)(pairs, size)
        maps, first = AnomalyHead(unsmoothed)(pairs, size).maps, AnomalyHead(unsmoothed)(pairs[:1], size).maps
        resized = torch.nn.functional.interpolate(maps[:, None], (h["evaluate"],) * 2, mode="bilinear")[:, 0]
    loss.backward()
    found = {"map_image": maps, "level_map0": first, "map_resized": resized, "map": scored.maps}
    found |= {"score": scored.image_scores, "loss": loss, **more}
    for group, pair in enumerate(pairs):
        found |= {f"en{group}": pair.target, f"de{group}": pair.reconstruction}
    for name in case.arrays:
        if name.startswith("grad:"):
            found[name] = network.get_parameter(released_name(name.removeprefix("grad:"))).grad
    assert found.keys() == case.arrays.keys()
    case.check(found)


@cache
def cases_of(method: str) -> list[ParityCase]:
    descriptions = [one for file in sorted(FOLDER.glob("cases*.json")) for one in json.loads(file.read_text())]
    return [ParityCase(FOLDER, one) for one in descriptions if one["method"] == method]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "parity(method, having=None): runs a test with `case` once per recorded case of the released code"
    )


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("parity")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    having = marker.kwargs.get("having")
    chosen = [case for case in cases_of(*marker.args) if having is None or case.has(having)]
    metafunc.parametrize(
        "case",
        [
            pytest.param(case, id=case.tag, marks=pytest.mark.program if FULL_SIZE.get(case.method) == case.tag else ())
            for case in chosen
        ],
    )


@pytest.fixture(name="assert_parity")
def _assert_parity() -> Callable[..., None]:
    return assert_parity


@pytest.fixture(name="check_decoder")
def _check_decoder() -> Callable[..., None]:
    return check_decoder


@pytest.fixture
def parity_cases() -> Callable[[str], list[ParityCase]]:
    """All recorded cases of a method."""
    return cases_of


@pytest.fixture
def parity_keys() -> Callable[[str], Any]:
    """The content of <name>_keys.json: names and shapes of released state dicts."""
    return lambda name: json.loads((FOLDER / f"{name}_keys.json").read_text())
