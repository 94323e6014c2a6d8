"""What the READMEs name exists: targets, variables, methods, sweeps, tables, files. `make readme` runs the commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import readme

ROOT = Path(__file__).resolve().parents[1]
TEXTS = sorted(
    ROOT / name
    for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
)
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"\$\(?(?:foreach o,\$\()?\$?([A-Z_]{2,})\b", MAKEFILE)) | set(
    re.search(r"VALUES := ((?:.*\\\n)*.*)", MAKEFILE).group(1).replace("\\", " ").split()
)


def _names(variable: str) -> set[str]:
    """What a variable can be, for those with a list of their own."""
    if variable == "ABLATION":
        return {path.stem for path in (ROOT / "sweeps").glob("*.yaml")}
    if variable == "METHOD":
        return {"mine"} | {path.stem for path in (ROOT / "sweeps/profiles/paper").glob("*.yaml")}
    if variable == "PROFILE":
        return {path.name for path in (ROOT / "sweeps/profiles").iterdir() if path.is_dir()}
    if variable == "DATASET":
        return {path.stem for path in (ROOT / "datamodules/readers").glob("*.py")}
    if variable == "TABLE":
        return {path.stem for path in (ROOT / "results/tables/specs").glob("*.yaml")}
    return set()


@pytest.mark.parametrize("file", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_targets_variables_and_values_that_exist(file):
    text = file.read_text()
    commands = [block.text for block in readme.blocks(file.name, text) if block.language == "bash"]
    commands += [found.replace("\n", " ") for found in re.findall(r"`(make [^`]+)`", text)]
    unknown = []
    for command in commands:
        for part in re.split(r"&&|;", command):
            words = shlex.split(part)
            if words[:1] != ["make"]:
                continue
            assigned = dict(word.split("=", 1) for word in words[1:] if re.match(r"[A-Z_]+=", word))
            unknown += [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and word not in TARGETS]
            unknown += [f"{name}=" for name in assigned if name not in VARIABLES]
            for name, value in assigned.items():
                known = _names(name)
                unknown += [
                    f"{name}={v}" for v in value.split(",") if known and v not in known and not re.match(r"$|<", v)
                ]
    assert not unknown, f"{file.name} names {', '.join(unknown)}"


@pytest.mark.parametrize("file", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(file):
    links = re.findall(r"\]\(([^)#\s]+)", file.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (file.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("file", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_are_headings(file):
    missing = []
    for link, anchor in re.findall(r"\]\(((?!\w+:)[^)#\s]*)#([^)\s]+)\)", file.read_text()):
        target = file.parent / link if link else file
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        missing += [f"{link}#{anchor}"] * (anchor not in known)
    assert not missing


def test_the_script_knows_every_readme_with_commands():
    with_commands = {
        str(file.relative_to(ROOT))
        for file in TEXTS
        if file.name == "README.md" and any(readme.blocks(file.name, file.read_text()))
    }
    assert with_commands == set(readme.FILES)


def test_most_commands_are_run():
    commands = [
        block
        for file in readme.FILES
        for block in readme.blocks(file, (ROOT / file).read_text())
        if block.language == "bash"
    ]
    assert len(commands) > 20
    run = [command for command in commands if not readme.why_not(command)]
    assert len(run) > len(commands) / 2
