"""The numbers of the documents are the reference records': rows that name their cell are filled from them."""

import pytest

from results.__main__ import main
from results.aggregator.documents import DOCUMENTS, METRICS, DocumentError, filled

HEAD = "| percent | I-AUROC | P-AUROC | made by | train s |\n|---|---:|---:|---|---:|\n"


def row(cell, *rest):
    return f"| a method <!-- {cell} --> | {' | '.join(rest or ('0.0', '0.0', 'hand', '7'))} |\n"


def test_the_documents_say_what_the_records_say():
    assert main(["documents", "--check"]) == 0
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    assert all(text.count(": method=") > 10 for text in texts)
    assert {"I-AUROC", "P-AUROC", "P-AP", "AUPRO", "DSC"} <= set(METRICS)


def test_a_row_gets_its_cells_mean_over_categories_and_seeds_with_spread(runs):
    for seed, value in enumerate((0.8, 0.9)):
        values = {("", "gear", "image_auroc"): value - 0.3}
        runs.add(
            "toy", {"model.size": [4, 3]}, seed, value=value, values=values, provenance={"train_seconds": 12.4 + seed}
        )
    runs.add("toy", {"model.size": [4]}, 0, value=0.123, undefined=[("", "gear", "pixel_auroc")])
    plain = "| by hand | 1.0 | 1.0 | hand | 1 |\n"
    text = f"# Text\n\n{HEAD}{row('toy: size=[4,3]')}{row('toy: size=4')}{plain}\nMore `| text`.\n"
    text = text.replace("size=4 ", "size=[4] ")
    ours = filled(text, "a.md", runs.root).splitlines()
    assert ours[4] == "| a method <!-- toy: size=[4,3] --> | 75.0 ± 7.1 | 85.0 ± 7.1 | hand | 13 ± 1 |"
    assert ours[5] == "| a method <!-- toy: size=[4] --> | 12.3 | – | hand | – |"  # never a mean over fewer categories
    assert ours[:4] + ours[6:] == text.splitlines()[:4] + text.splitlines()[6:]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("toy: size=2", r"a.md, line 3: the row must name one cell of toy, and names 0$"),
        ("toy: kind=a", r"names 2: .*size=1.*size=3"),
        ("toy: sise=1", r"has no parameter 'sise'. Did you mean 'size'"),
        ("other: size=1", r"no reference records of a sweep other; `make reference ONLY=other`"),
        ("toy on photos: size=1", r"names 0$"),
        ("toy size=1", r"line 3: the comment must be like <!-- sweep on data: key=value"),
        ("toy: size=1 --> | 4 <!-- ", r"line 3: the row has 6 columns, its table's header 5"),
    ],
)
def test_a_row_that_names_no_one_cell_is_refused_by_its_line(runs, cell, message):
    for size in (1, 3):
        runs.add("toy", {"model.size": size, "kind": "a"})
    with pytest.raises(DocumentError, match=message):
        filled(HEAD + row(cell), "a.md", runs.root)


def test_a_damaged_record_is_no_smaller_number_of_seeds(runs):
    for seed in (0, 1):
        folder = runs.add("toy", {"size": 1}, seed)
    (folder / "metrics.csv").write_text("broken")
    with pytest.raises(DocumentError, match=r"line 3: a record of toy is damaged: .*seed1"):
        filled(HEAD + row("toy: size=1"), "a.md", runs.root)


def test_line_ends_and_bars_in_words_stay(runs):
    runs.add("toy", {"size": 1}, value=0.5)
    text = (HEAD + row("toy: size=1")).replace("a method", r"a \| b").replace("\n", "\r\n").rstrip()
    ours = filled(text, "a.md", runs.root)
    assert filled("| a\n|", "a.md", runs.root) == "| a\n|"
    assert ours.splitlines()[2] == r"| a \| b <!-- toy: size=1 --> | 50.0 | 50.0 | hand | – |"
    assert ours.count("\r\n") == 2


def test_the_command_writes_what_differs_or_only_names_it(runs, tmp_path, monkeypatch, capsys):
    runs.root = tmp_path / "results" / "reference"
    runs.add("toy", {"size": 1}, value=0.5)
    path = tmp_path / "a.md"
    path.write_text(HEAD + row("toy: size=1", "49.0", "50.0", "hand", "–"))
    monkeypatch.chdir(tmp_path)
    assert main(["documents", "--check", "a.md"]) == 1
    assert "49.0" in path.read_text()
    assert "| 50.0 | 50.0 | hand" in capsys.readouterr().out.replace("\n", "")
    assert main(["documents", "a.md"]) == 0
    assert path.read_text() == HEAD + row("toy: size=1", "50.0", "50.0", "hand", "–")
    assert main(["documents", "--check", "a.md"]) == 0
    path.write_bytes(b"\xff")
    assert main(["documents", "a.md"]) == 2
    assert main(["documents", "missing.md"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "a.md is not UTF-8" in told
    assert "missing.md" in told
