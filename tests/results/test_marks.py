"""What may be called best, which records may meet, and what is said where no run fits."""

from results.aggregator import render
from results.aggregator.build import paper_table, sweep_table
from results.aggregator.scores import distinct
from results.aggregator.spec import Entry, Spec, find_spec
from results.aggregator.table import Cell, Column, Row, Table, Value, mark_values

COLUMN = Column("I-AUROC", metric="image_auroc")
SPEC = Spec("s", "A title", sweep="s", columns=(Entry(("I-AUROC",), where={"metric": "image_auroc"}),))


def marks(*numbers):
    rows = [Row((str(n),)) for n in range(len(numbers))]
    cells = [[Cell(runs=Value(mean, std, 2))] for mean, std in numbers]
    table = Table("t", "t", "runs", ("",), rows, [COLUMN], cells)
    mark_values(table, "columns")
    return [line[0].runs.mark for line in cells]


def test_no_number_is_marked_within_the_spread_of_the_seeds():
    assert marks((53.7, 1.0), (53.4, 0.9), (40.0, 0.1)) == ["", "", ""]
    assert marks((60.0, 1.0), (53.4, 0.9), (53.0, 0.1)) == ["best", "", ""]
    assert marks((60.0, 1.0), (53.4, 0.9), (40.0, 0.1)) == ["best", "second", ""]
    assert marks((53.7, None), (53.4, None)) == ["best", "second"], "one seed has no spread"


def test_a_latex_caption_is_one_sentence_and_the_rest_stands_below(runs):
    for value in (1, 2):
        runs.add("s", {"a.b": value}, value=0.9 + value / 100, notes=["backbone: unused in the file: blocks.5.0"])
    table = sweep_table(SPEC, runs.read())
    text = render.latex(table)
    assert "\\caption{A title.}" in text
    assert text.index("\\end{tabular}") < text.index("Protocol clean")
    assert "unused in the file" not in render.markdown(table) + text


def test_equal_records_of_two_runners_meet_and_others_do_not(runs):
    runs.add("s", {"a.b": 1}, 0, run="agents")
    runs.add("s", {"a.b": 1}, 0, run="local")
    runs.add("s", {"a.b": 1}, 0, run="other_numbers", value=0.8)
    runs.add("s", {"a.b": 1}, 0, run="other_options", config="trainer:\n  max_epochs: 4\n")
    assert [stored.record.run for stored in distinct(runs.read())] == ["agents", "other_numbers", "other_options"]


def test_a_papers_table_says_why_no_run_fits(runs):
    runs.add("s", {"a.b": 1}, 0)
    caption = paper_table(find_spec("uniad_1"), "both", runs.read()).caption
    assert "No run fits this table yet. It asks for" in caption
    assert "on MVTec AD" in caption
    assert "1 of UniAD on synthetic (unified, sweep s)" in caption


def test_rows_whose_loss_still_falls_are_named_below_the_table(runs):
    falling = [(epoch, epoch, "train/loss", 1 / (epoch + 1)) for epoch in range(20)]
    runs.add("s", {"a.b": 1}, history=falling)
    runs.add("s", {"a.b": 2}, value=0.8)
    notes = [note for note in sweep_table(SPEC, runs.read()).notes if note.startswith("Still falling")]
    assert len(notes) == 1
    assert notes[0].split(": ")[-1].startswith("1.")
