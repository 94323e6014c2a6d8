"""Records from anybody: one that is bad is named and left out, whatever is in it, and nothing leaves its folder."""

import contextlib
import hashlib
import io
import json
import os

import pytest

from results.__main__ import main
from results.aggregator.records import RecordError, read_record, read_records
from results.aggregator.render import latex, markdown, tex
from results.aggregator.table import Cell, Column, Row, Table, Value
from results.common.files import restore_replaced

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
PICTURE = b"\xff\xd8picture"
INDEX = "dataset,category,rank,defect,image_score,file,caption\nsynthetic,bolt,best,hole,0.5,bolt.jpg,a caption\n"


def change(path, **values):
    raw = json.loads((path / "record.json").read_text())
    (path / "record.json").write_text(json.dumps({**raw, **values}))


def rewrite(path, name, content):
    """A file's content and its checksum, as somebody would who means it."""
    (path / name).write_bytes(content)
    raw = json.loads((path / "record.json").read_text())
    change(path, files={**raw["files"], name: hashlib.sha256(content).hexdigest()})


def metrics(path, old, new):
    rewrite(path, "metrics.csv", (path / "metrics.csv").read_bytes().replace(old, new, 1))


def double(path):
    content = (path / "metrics.csv").read_bytes()
    rewrite(path, "metrics.csv", content + content.splitlines(keepends=True)[1])


def sparse(path):
    with open(path / "config.yaml", "r+b") as file:
        file.truncate(1 << 40)


def fifo(path):
    (path / "history.csv").unlink()
    os.mkfifo(path / "history.csv")


def nested(path):
    (path / "record.json").write_text('{"notes": ' + "[" * 200_000 + "]" * 200_000 + "}")


FAULTS = {
    "no files": lambda path: change(path, files=None),
    "notes": lambda path: change(path, notes=5),
    "datasets": lambda path: change(path, datasets=[{"name": 3, "fingerprint": "x", "categories": ["a"]}]),
    "categories": lambda path: change(path, datasets=[{"name": "a", "fingerprint": "x", "categories": [None]}]),
    "definitions": lambda path: change(path, metrics={"version": "1", "definitions": 3}),
    "parameters": lambda path: change(path, parameters={"trainable": "many"}),
    "seconds": lambda path: change(path, provenance={"wall_seconds": [1]}),
    "nan": lambda path: change(path, provenance={"wall_seconds": float("nan")}),
    "deep": nested,
    "deep cell": lambda path: change(path, cell={"a": json.loads("[" * 60 + "]" * 60)}),
    "bomb": lambda path: rewrite(path, "config.yaml", BOMB.encode()),
    "deep yaml": lambda path: rewrite(path, "config.yaml", b"a: " + b"[" * 5000 + b"]" * 5000),
    "no yaml": lambda path: rewrite(path, "config.yaml", b"a: [\n"),
    "markup": lambda path: change(path, protocol="[/]"),
    "huge": sparse,
    "fifo": fifo,
    "above one": lambda path: metrics(path, b",0.9,", b",7.7,"),
    "infinite": lambda path: metrics(path, b",0.9,", b",inf,"),
    "no reason": lambda path: metrics(path, b",0.9,", b",,"),
    "twice": double,
}


@pytest.fixture(scope="module")
def told(runs_at, tmp_path_factory):
    """Beside good records one of each fault: their folders, and per command its exit code and what it says."""
    folder = tmp_path_factory.mktemp("records")
    runs, bad = runs_at(folder / "runs"), {}
    (folder / "mask.yaml").write_text("name: mask\nmethod: grid\nparameters: {model.size: {values: [1, 7]}}\n")
    for size in (1, 7):
        for seed in (0, 1):
            runs.add("mask", {"model.size": size}, seed)
    for seed, (fault, damage) in enumerate(FAULTS.items(), 2):
        bad[fault] = runs.add("mask", {"model.size": 7}, seed)
        damage(bad[fault])
    where, said = ["--root", str(runs.root), "--sweeps", str(folder)], {}
    for command in (
        ["sweep", "mask", *where, "--out", str(folder / "out")],
        ["tables", *where, "--out", str(folder / "out")],
        ["compare", "mask:size=1", "mask:size=7", *where],
        ["figures", "mask", *where, "--out", str(folder / "out")],
        ["report", *where, "--out", str(folder / "report.html")],
    ):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            said[command[0]] = main(command), printed.getvalue()
    return bad, said


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_record_is_named_and_the_others_make_every_table(runs, told, fault):
    bad, said = told
    for command, (code, text) in said.items():
        assert code == 1, command  # everything is written, and the code says that a record was left out
        assert f"left out: {bad[fault]}" in text, command
    runs.add("mask", {"model.size": 1})
    FAULTS[fault](runs.add("mask", {"model.size": 7}))
    found = read_records(runs.root, warn=False)
    assert (len(found), len(found.damaged)) == (1, 1)


def test_every_file_of_a_record_has_a_checksum_and_a_picture_is_compared_when_shown(runs):
    path = runs.add(
        attachments={"heatmaps/index.csv": INDEX, "heatmaps/bolt.jpg": PICTURE, "image_scores.csv": "id\n1\n"}
    )
    assert read_record(path).picture("bolt.jpg") == PICTURE
    (path / "heatmaps/bolt.jpg").write_bytes(PICTURE[::-1])
    with pytest.raises(RecordError, match=r"bolt\.jpg is not what the run wrote"):
        read_record(path).picture("bolt.jpg")
    with pytest.raises(RecordError, match=r"bolt\.jpg is not what the run wrote"):
        read_record(path, pictures=True)
    (path / "image_scores.csv").write_text("id\n2\n")
    with pytest.raises(RecordError, match=r"image_scores\.csv is not what the run wrote"):
        read_record(path)


def test_records_from_before_those_checksums_are_read_and_said_once(runs, tmp_path, capsys):
    for seed in (0, 1):
        path = runs.add("mask", {"model.size": 1}, seed, attachments={"image_scores.csv": "id\n1\n"})
        raw = json.loads((path / "record.json").read_text())
        change(path, files={name: raw["files"][name] for name in ("metrics.csv", "history.csv", "config.yaml")})
    assert main(["sweep", "mask", "--root", str(runs.root), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("without checksums") == 1


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "link.jpg", "..\\\\secret"])
def test_no_picture_of_a_record_lies_outside_of_it(runs, tmp_path, capsys, file):
    (tmp_path / "secret").write_text("SECRET")
    path = runs.add(attachments={"heatmaps/index.csv": INDEX, "heatmaps/bolt.jpg": PICTURE})
    (path / "heatmaps/link.jpg").symlink_to(tmp_path / "secret")
    rewrite(path, "heatmaps/index.csv", INDEX.replace("bolt.jpg", file).encode())
    assert main(["report", "--root", str(runs.root), "--out", str(tmp_path / "r.html")]) == 1
    assert f"left out: {path}" in capsys.readouterr().err
    assert "U0VDUkVU" not in (tmp_path / "r.html").read_text(), "base64 of the secret"


def test_a_record_whose_replacing_was_cut_off_between_the_two_renames_comes_back(runs):
    path = runs.add(run="a.b")
    path.rename(path.with_name(".a.b.some.host-12-0123abcd.old"))
    assert [stored.record.run for stored in read_records(runs.root)] == ["a.b"]
    path.rename(path.with_name(".a.b.host-12-0123abcd.old"))
    restore_replaced(path.parent)
    assert path.is_dir()


def table(name):
    row, column = Row((name,), group=name), Column(name, metric="image_auroc")
    return Table(
        "t", name, "runs", ("Category",), [row], [column], [[Cell(runs=Value(90.0))]], caption=name, notes=[name]
    )


def test_names_in_markdown_make_no_html_and_no_links():
    text = markdown(table("<img src=x onerror=alert(1)> [a](javascript:x) |"))
    assert "<img" not in text
    assert "](" not in text.replace("\\](", "")
    assert "&lt;img" in text


def test_names_in_latex_are_letters_that_latex_has():
    text = latex(table("木目 \x1b[31m é"))
    assert "é" in text
    assert "u6728" in text
    assert "x1b" in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert tex("Ω") == "\\texttt{u03a9}" or tex("Ω").isascii()


def test_names_with_brackets_are_shown_on_the_terminal(runs, tmp_path, capsys):
    runs.add()
    assert main(["compare", "volume [m3]", "[/]", "--root", str(runs.root)]) == 2
    assert "'volume [m3]'" in capsys.readouterr().err
