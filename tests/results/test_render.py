"""The same table in every output: LaTeX that compiles, Markdown that GitHub draws, HTML that is well formed."""

import re
import shutil
import subprocess

import pytest

from results.__main__ import main
from results.aggregator import render
from results.aggregator.build import paper_table
from results.aggregator.spec import find_spec, spec_names
from results.aggregator.table import Cell, Column, Row, Table, Value, mark_values

PAPER_TABLES = [name for name in spec_names() if "source" in find_spec(name).where and find_spec(name).rows is not None]


def nasty():
    """A table with every character that LaTeX, Markdown or HTML could stumble over."""
    signs = r"50% & $1 #2 a_b {c} ~ ^ \ < > | ± − – ★ × λ_l α β θ ✓ * ` \"quoted\""
    value = Value(97.25, 0.5, 2, gap=-1.25, records=("sweep/a_b=1,c",))
    cells = [[Cell(runs=value), Cell(runs=Value(reason="no <run> & none_of_it"))]]
    columns = [Column("A_1 %", "G & H", "image_auroc"), Column("B", "G & H", "dsc")]
    table = Table("nasty_1", signs, "runs", ("Row & head",), [Row((signs,), "Group_1", default=True)], columns, cells)
    table.caption, table.notes, table.missing, table.warnings = signs, [signs], [signs], [signs]
    return table


def check_latex(text):
    """Structure that pdflatex needs: balanced braces and environments, the same number of cells in every line."""
    plain = re.sub(r"\\[\\{}&%$#_]", " ", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1))
    body = text.split("\\toprule")[1].split("\\bottomrule")[0]
    lines = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert lines
    for line in lines:
        spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        cells = len(re.findall(r"(?<!\\)&", line)) + 1
        assert cells - len(spans) + sum(spans) == columns, line
    assert not re.search(r"[^\x00-\x7f]", text), "pdflatex needs no font for signs"
    assert not re.search(r"(?<!\\)[#^~](?![{}])", re.sub(r"\\textasciitilde|\\textasciicircum", "", plain))


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_every_papers_table_is_sound_latex(name):
    check_latex(render.latex(paper_table(find_spec(name))))


def test_signs_in_labels_and_captions_do_not_break_latex():
    check_latex(render.latex(nasty()))


def test_latex_compiles(tmp_path):
    """With pdflatex where it is installed; the structure is checked in any case."""
    names = []
    for table in (nasty(), paper_table(find_spec("uniad_1")), paper_table(find_spec("ulsad_3"))):
        text = render.latex(table)
        check_latex(text)
        (tmp_path / f"{table.name}.tex").write_text(text, encoding="utf-8")
        names.append(f"{table.name}.tex")
    (tmp_path / "tables.tex").write_text(render.latex_document(names), encoding="utf-8")
    assert render.latex_document(names).count("\\input") == 3
    if shutil.which("pdflatex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-1500:]
        assert b"3 pages" in done.stdout


def test_a_standalone_table_is_a_document():
    text = render.latex(nasty(), standalone=True)
    assert text.startswith("\\documentclass")
    assert text.rstrip().endswith("\\end{document}")


def test_markdown_has_the_same_number_of_cells_in_every_line():
    text = render.markdown(nasty())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert counts == {4}


def test_html_escapes_what_is_not_markup():
    text = render.html_text(nasty())
    assert "50% &amp; $1" in text
    assert "no &lt;run&gt; &amp; none_of_it" in text
    assert 'data-records="sweep/a_b=1,c"' in text


def test_the_terminal_is_wide_enough_to_cut_nothing():
    text = render.terminal(paper_table(find_spec("uniad_1")))
    assert "…" not in text
    assert "99.7 ± 0.04" in text


def test_a_narrow_terminal_gets_the_columns_in_blocks_and_every_number():
    table = paper_table(find_spec("uniad_1"))
    texts = [render.terminal(table, width) for width in (400, 60)]
    plain = [re.sub("\x1b\\[[0-9;]*m", "", text) for text in texts]
    grids = [[line for line in text.splitlines() if line[:1] in "┏┃┡│├└"] for text in plain]
    assert len([line for line in grids[0] if line[:1] == "┏"]) == 1
    assert len([line for line in grids[1] if line[:1] == "┏"]) > 1
    assert max(map(len, grids[1])) <= 60
    numbers = [sorted(re.findall(r"\d+\.\d+", "\n".join(grid))) for grid in grids]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.04, "0.0"), (0.04, "0.0"), (-1.25, "−1.2"), (1.0, "+1.0")],
)
def test_differences_have_a_sign_and_zero_has_none(value, text):
    assert render.signed(value, 1) == text


def test_one_value_or_all_equal_is_no_ranking():
    columns = [Column("A", metric="dsc"), Column("B", metric="dsc_threshold")]
    rows = [Row(("a",)), Row(("b",))]
    cells = [[Cell(runs=Value(50.0)), Cell(runs=Value(1.0))], [Cell(runs=Value(50.01)), Cell(runs=Value(2.0))]]
    table = Table("t", "t", "runs", ("",), rows, columns, cells)
    mark_values(table, "columns")
    assert [cell.runs.mark for line in cells for cell in line] == [""] * 4


def test_make_tables_rebuilds_every_papers_table(tmp_path, capsys):
    assert main(["tables", "--root", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}.published.{suffix}" for name in PAPER_TABLES for suffix in ("md", "csv", "tex")} <= written
    assert {"audit.md", "tables.tex"} <= written
    for line in re.findall(r"\\input\{(.*?)\}", (tmp_path / "out" / "tables.tex").read_text()):
        assert line in written
    for path in (tmp_path / "out").glob("*.published.tex"):
        check_latex(path.read_text(encoding="utf-8"))


def test_one_table_in_one_format_goes_to_the_standard_output_only(tmp_path, capsys):
    words = ["table", "unias_4", "--format", "latex", "--out", str(tmp_path / "out"), "--root", str(tmp_path / "runs")]
    assert main([*words, "--source", "published"]) == 0
    assert "\\textbf{65.12}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["table", "unias_5"]) == 2
    assert "Did you mean" in capsys.readouterr().err
