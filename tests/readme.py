"""Runs every command of the READMEs as a reader would, in a copy of the repository: `make readme`.

`make readme ONLY="wandb-sweep|make agents"` runs those that fit a pattern (what they build on must be among them).

The commands are taken as they stand. In the copy every profile trains for one epoch, the `paper` profiles are the `demo`
ones (so no model hub is needed), small trees lie where the text names data, and W&B is a stand-in on this machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "README.md",
    "datamodules/README.md",
    "sweeps/README.md",
    "results/README.md",
    "lightning_modules/metrics/README.md",
    "lightning_modules/exporting/README.md",
    "lightning_modules/benchmarks/README.md",
)
"""Every README with commands, in an order in which each finds what it builds on: the first one trains `mine`."""
NOT_RUN = {
    r"make test(-all)?$": "would start the tests from within",
    r"make baselines": "installs a large package",
    r"make export-requirements": "installs packages; `make export` needs them",
    r"make data ": "downloads",
    r".*\bsbatch ": "needs a SLURM cluster",
    r"make import ": "needs an authors' checkpoint",
    r"make submission ": "needs a run on MVTec AD 2",
}
"""Commands that stay out, by pattern, with the reason; each has tests of its own."""
GIVEN = {
    "metrics.update(": """
import numpy as np
draw = np.random.default_rng(0)
maps, masks = draw.random((4, 32, 32), dtype=np.float32), np.zeros((4, 32, 32), np.uint8)
labels, categories, ids = [0, 0, 1, 1], ["bottle"] * 4, [1, 2, 3, 4]
masks[2:, 8:16, 8:16], image_scores = 1, maps.max((1, 2))
""",
    "engine.predict(": """
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim
datamodule = MVTecAD("/data/mvtec", "bottle", num_workers=0)
model, engine = Padim("resnet18", pre_trained=False), Engine()
engine.fit(model, datamodule=datamodule)
""",
}
"""What a piece of Python leaves to its reader, by a call that it makes: code that stands before it."""
STAND_INS = {
    "/data/mvtec": {"bottle": "bottle_cap", "cable": "cable"},
    "/data/visa": {"candle": "fabric", "pcb1": "circuit_board"},
}
"""Products of the embedded benchmark by the category whose place they take."""
SWEEP = "entity/unirecon/abc123"


@dataclass(frozen=True)
class Block:
    """A command, or a piece of Python, with where it stands."""

    file: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def blocks(file: str, text: str) -> Iterator[Block]:
    """The commands of a Markdown text's `bash` blocks, one by one, and its `python` blocks."""
    for found in re.finditer(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S):
        language, content = found.groups()
        line = text.count("\n", 0, found.start()) + 2
        if language == "python":
            yield Block(file, line, language, content)
            continue
        for number, command in _commands(content):
            yield Block(file, line + number, language, command)


def _commands(content: str) -> Iterator[tuple[int, str]]:
    """(line number from 0, command without its comment) of a shell text; a backslash joins lines."""
    start, waiting = 0, ""
    for number, line in enumerate(content.splitlines()):
        start = start if waiting else number
        waiting += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        command = re.sub(r"(^|\s)#\s.*$", "", waiting).strip()
        if command:
            yield start, re.sub(r"\s+", " ", command)
        waiting = ""


def why_not(block: Block) -> str:
    """Why a command or a piece of Python is not run; empty for those that are."""
    if block.language == "python":
        without = "anomalib" in given(block.text) and importlib.util.find_spec("anomalib") is None
        return "needs anomalib, `make baselines`" if without else ""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, block.text)), "")


def given(python: str) -> str:
    """What stands before a piece of Python."""
    return "".join(code for call, code in GIVEN.items() if call in python)


def main(only: str = "") -> int:
    """Runs all of them, or those that fit a pattern; 1 if one failed."""
    sys.path.insert(0, str(ROOT))
    from rich.console import Console

    from tests.sweeps.loopback import Server

    console = Console(highlight=False, soft_wrap=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server()
        clone, places = _copy(Path(folder))
        paths = os.pathsep.join((str(clone), str(clone / "build")))
        environment = {**os.environ, **server.environment, "WANDB": "online", "PYTHONPATH": paths}
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
            environment.pop(name, None)
        for file in FILES:
            for block in blocks(file, (ROOT / file).read_text()):
                if not re.search(only, block.text):
                    continue
                shown = block.text.splitlines()[0]
                reason = why_not(block)
                if reason:
                    console.print(f"{block.place}: {shown}  [not run: {reason}]", markup=False)
                    continue
                text = block.text if block.language == "bash" else given(block.text) + block.text
                for written, meant in places.items():
                    text = text.replace(written, meant)
                words = ["bash", "-ec", text] if block.language == "bash" else [sys.executable, "-c", text]
                since = time.monotonic()
                done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
                console.print(f"{block.place}: {shown}  {time.monotonic() - since:.0f} s", markup=False)
                if done.returncode:
                    failed.append(block.place)
                    console.print((done.stdout + done.stderr)[-3000:], markup=False)
                elif "wandb-sweep" in text:
                    places[SWEEP] = re.findall(r"SWEEP=(\S+)", done.stdout)[0]
    console.print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "every command ran")
    return bool(failed)


def _copy(folder: Path) -> tuple[Path, dict[str, str]]:
    """A clone with short profiles and this environment, and what the places that the texts name stand for there."""
    clone = folder / "unirecon"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / ".venv").symlink_to(Path(sys.prefix))
    for file in clone.glob("requirements*.txt"):
        os.utime(file, (0, 0))  # the environment is older than the clone and complete
    (clone / "build").mkdir()
    (clone / "build/unirecon_metrics").symlink_to(clone / "lightning_modules/metrics")  # as `pip install .` would
    for profile in sorted((clone / "sweeps/profiles/demo").glob("*.yaml")):
        content = yaml.safe_load(profile.read_text())
        content.setdefault("trainer", {})["max_epochs"] = 1
        profile.write_text(yaml.safe_dump(content))
        shutil.copy(profile, clone / "sweeps/profiles/paper" / profile.name)
    subprocess.run(["make", "synthetic"], cwd=clone, check=True, capture_output=True)
    photos, new = folder / "photos", folder / "new"
    shutil.copytree(clone / "datamodules/photos", photos, ignore=shutil.ignore_patterns("*.md"))
    defect = next(path for path in sorted(photos.glob("*/test/*")) if path.name != "good")
    shutil.copytree(defect, new)
    shutil.copy(next(new.iterdir()), clone / "new.png")
    places = {"/new/photos": str(new), "/photos": str(photos), "/place": str(folder)}
    for place, categories in STAND_INS.items():
        places[place] = str(folder / Path(place).name)
        for category, product in categories.items():
            shutil.copytree(clone / "data/synthetic" / product, Path(places[place]) / category)
    return clone, places


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
