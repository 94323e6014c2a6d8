"""Parity with the released implementations: `@pytest.mark.parity("<method>")` runs a test once per recorded case.

The cases come from the folder named by the environment variable PARITY_DIR, or from tests/models/parity.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

# The networks here are tiny: on a shared machine more threads only wait for each other.
torch.set_num_threads(1)


def fill(name: str, shape: list[int]) -> torch.Tensor:
    """The recorded runs' numbers: float32 standard normals that depend on the name alone."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape), dtype=np.float32))


@dataclass(frozen=True)
class ParityCase:
    """One recorded run: `hparams` and `input` as in cases.json."""

    folder: Path
    method: str
    tag: str
    key_prefix: str
    file: str
    input: dict
    hparams: dict
    arrays: dict

    @staticmethod
    def fill(name: str, shape: list[int]) -> torch.Tensor:
        return fill(name, shape)

    def input_tensor(self) -> torch.Tensor:
        return fill(self.input["name"], self.input["shape"])

    def key_shapes(self) -> dict:
        """Names and shapes of the released state dict, as <method>_keys.json has them."""
        return json.loads((self.folder / f"{self.method}_keys.json").read_text())

    def state(self, shapes: dict, rule: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The released state dict: rule(name, standard normals) for each of the shapes, under the case's prefix."""
        names = {self.key_prefix + name: shape for name, shape in shapes.items()}
        return {name: rule(name, fill(name, shape)) for name, shape in names.items()}

    def names(self) -> list[str]:
        """Of the recorded arrays."""
        with np.load(self.folder / self.file) as arrays:
            return [name.removeprefix(f"{self.tag}.") for name in arrays if name.startswith(f"{self.tag}.")]

    def array(self, name: str = "") -> np.ndarray:
        with np.load(self.folder / self.file) as arrays:
            return arrays[f"{self.tag}.{name}" if name else self.tag]


def assert_parity(found: torch.Tensor, recorded: np.ndarray, tolerance: float = 1e-4) -> None:
    """Largest error relative to the largest recorded value."""
    assert tuple(found.shape) == recorded.shape
    error = np.abs(found.detach().numpy() - recorded).max() / np.abs(recorded).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def pytest_configure(config):
    config.addinivalue_line("markers", "parity(method): runs once per recorded case of the method's released code")


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("parity")
    if marker is None:
        return
    folder = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
    cases = json.loads((folder / "cases.json").read_text())
    chosen = [ParityCase(folder=folder, **case) for case in cases if case["method"] == marker.args[0]]
    metafunc.parametrize("parity_case", chosen, ids=[case.tag for case in chosen])


@pytest.fixture(name="assert_parity")
def _assert_parity() -> Callable[..., None]:
    return assert_parity
