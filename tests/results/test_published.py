"""The papers' tables: rebuilt number by number, and checked against themselves."""

import csv
import io
from pathlib import Path

import pytest

from results.aggregator import audit, render
from results.aggregator.build import paper_table
from results.aggregator.published import COLUMNS, read_published
from results.aggregator.spec import SpecError, find_spec, spec_names

FOLDER = Path(__file__).parents[2] / "results" / "published"
PAPERS = {
    "unias": ("unias.csv", ["1", "2", "3", "4"]),
    "rlr": ("rlr.csv", ["1", "2"]),
    "uniad": ("uniad.csv", ["1", "2"]),
    "ulsad": ("ulsad.csv", ["1", "2", "3", *map(str, range(6, 24))]),
}
IDS = [(f"{paper}_{table}", file, table) for paper, (file, tables) in PAPERS.items() for table in tables]


def csv_lines(file):
    """The CSV file read without the project's reader."""
    with open(FOLDER / file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("name", "file", "table"), IDS)
def test_a_rebuilt_table_holds_every_printed_number_and_no_other(name, file, table):
    rebuilt = {}
    for line in csv.DictReader(io.StringIO(render.csv_text(paper_table(find_spec(name), "published")))):
        if not line["published"]:
            continue
        key = (line["dataset"], line["category"], line["method"], line["variant"])
        for metric, value in ((line["metric"], line["published"]), (f"{line['metric']}_gap", line["published_gap"])):
            if value:
                assert (*key, metric) not in rebuilt, "a number stands twice in the table"
                rebuilt[(*key, metric)] = (float(value), line["published_std"] if not metric.endswith("_gap") else "")
    printed = {
        (line["dataset"], line["category"], line["method"], line["variant"], line["metric"]): line
        for line in csv_lines(file)
        if line["table"] == table
    }
    assert set(rebuilt) == set(printed)
    for key, line in printed.items():
        value, std = rebuilt[key]
        assert value == float(line["value"]), key
        assert (std == "") == (line["std"] == ""), key
        if std:
            assert float(std) == float(line["std"]), key


@pytest.mark.parametrize(("name", "file", "table"), IDS)
def test_what_a_reader_sees_in_a_rebuilt_table_is_the_printed_number(name, file, table):
    built = paper_table(find_spec(name), "published")
    text = render.markdown(built)
    body = [line for line in text.splitlines() if line.startswith("| ")]
    body = [line for line in body[1:] if not line.startswith("| *") or len(set(line.split("|")[2:-1])) > 1]
    assert len(body) == len(built.rows)
    for line, cells in zip(body, built.cells, strict=True):
        shown = [part.strip(" *").replace("<u>", "").replace("</u>", "") for part in line.split("|")[1:-1]]
        shown = shown[len(built.row_headers) :]
        for text, cell in zip(shown, cells, strict=True):
            if cell.published.mean is None:
                assert text == "–"
            else:
                assert float(text.split(" ")[0]) == cell.published.mean


def test_the_published_files_have_one_schema_and_no_number_twice():
    numbers = read_published()
    assert len(numbers) == sum(len(csv_lines(file.name)) for file in FOLDER.glob("*.csv"))
    for file in FOLDER.glob("*.csv"):
        assert tuple(csv_lines(file.name)[0]) == COLUMNS
    assert len(numbers) > 5000


def test_uniads_ablations_stay_blank_because_their_numbers_are_not_known():
    for name in ("uniad_components", "neighbor_mask", "feature_jitter", "identical_shortcut"):
        assert "source" not in find_spec(name).where


def found(kind, source):
    return {
        (finding.table, finding.what): (round(finding.printed, 2), round(finding.recomputed, 2))
        for finding in audit.disagreements(audit.audit())
        if finding.kind == kind and finding.source == source
    }


def test_the_audit_finds_every_mean_row_of_unias_that_is_not_the_mean():
    assert found("mean", "unias_supplement") == {
        ("1", "VisA · PatchCore · DSC"): (28.15, 29.41),
        ("1", "VisA · DRAEM · P-AP"): (34.49, 19.94),
        ("1", "VisA · RD4AD · DSC"): (8.34, 8.38),
        ("1", "VisA · UniAD · DSC"): (18.93, 18.91),
        ("1", "VisA · HVQ-Trans · DSC"): (26.71, 27.11),
        ("1", "VisA · UniAS · DSC"): (32.50, 34.13),
        ("2", "MVTec AD · AR"): (13.17, 14.22),
        ("2", "MVTec AD · PatchCore · P-AP"): (55.73, 58.71),
        ("2", "MVTec AD · DeSTSeg · DSC"): (43.61, 43.58),
        ("2", "MVTec AD · UniAS · P-AP"): (65.12, 64.19),
        ("2", "MVTec AD · UniAS · DSC"): (59.33, 59.34),
    }


def test_the_audit_finds_the_three_wrong_gaps_of_unias_table_3_and_only_them():
    assert sorted(found("gap", "unias_supplement").values()) == [(1.13, 1.73), (1.73, 3.98), (5.78, 5.28)]


def test_the_audit_finds_the_visa_column_that_repeats_btad_and_the_wrong_mean_of_dfr():
    copies = found("copy", "ulsad_paper")
    assert {what.split(" · ")[1] for _, what in copies} == {"PaDiM", "DFR", "CFLOW", "DRAEM", "FastFlow", "RD4AD"}
    assert all("VisA" in what and "BTAD" in what for _, what in copies)
    means = found("mean", "ulsad_paper")
    assert means["18", "VisA · DFR · I-AUROC"] == (85.18, 93.31)
    assert means["16", "BTAD · DFR · P-AUROC"] == (97.62, 97.61)
    assert {table for table, _ in means} == {"18", "16"}


def test_the_audit_suspects_the_row_that_equals_the_mean_row_and_solves_for_what_it_should_say():
    rows = found("row", "ulsad_paper")
    assert {table for table, _ in rows} == {"23"}
    assert all("pushpins" in what and "resnet50" in what and "SUSPECT ROW" in what for _, what in rows)
    # By hand: 5 x the printed mean less the other four categories of ResNet50.
    assert sorted(rows.values()) == [(41.26, 27.55), (75.15, 71.88), (79.49, 73.58), (81.79, 82.3)]
    assert {finding.source for finding in audit.audit() if finding.kind == "row"} == {"ulsad_paper"}


def test_the_audit_counts_every_mean_row_of_ulsads_appendix():
    findings = [f for f in audit.audit() if f.source == "ulsad_paper" and f.kind == "mean" and f.table != "23"]
    # 9 methods x 15 tables, 5 settings x 3 metrics, 8 settings x 3 metrics
    assert len(findings) == 9 * 15 + 15 + 24
    assert sum(f.verdict != "exact" for f in findings) == 7


def test_rounding_is_not_called_a_disagreement():
    table = audit.audit_table(audit.audit())
    assert all(abs(line[2].published.mean) > 0.01 for line in table.cells)
    assert "within rounding" in table.caption


def test_a_mistyped_table_gets_the_nearest_name():
    with pytest.raises(SpecError, match="Did you mean 'unias_"):
        find_spec("unias4")
    assert spec_names().index("ulsad_2") < spec_names().index("ulsad_10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\ncolums: [x]", "unknown key 'colums'. Did you mean 'columns'"),
        ("title: a\nrows: [x]", "has no columns"),
        ("title: a\nrows: [{lable: x}]\ncolumns: [dsc]", "Did you mean .*'label'"),
        ("title: a\ncolumns: [dsc]", "without `sweep`, rows must be listed"),
        ("title: a\nrow_headers: [a, b]\nrows: [x]\ncolumns: [dsc]", "1 labels for 2 headers"),
        ("title: a\nrow_headers: [a]\nrows: [{labels: [off]}]\ncolumns: [dsc]", "off, yes and no need quotes"),
        ("title: a\ncompare: up\nrows: [x]\ncolumns: [dsc]", "allowed: columns, rows, none"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_key_and_what_is_allowed(tmp_path, text, message):
    from results.aggregator.spec import read_spec

    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        read_spec(tmp_path / "t.yaml")


def test_the_audit_finds_the_means_of_uninets_readme_that_are_not_the_means():
    assert found("mean", "uninet_readme") == {
        ("multi-class MVTec AD (picture)", "MVTec AD · SimpleNet · setting=unified · I-AP"): (98.36, 98.35),
        ("multi-class VisA (picture)", "VisA · DiAD · setting=unified · I-AUROC"): (86.8, 86.42),
        ("multi-class VisA (picture)", "VisA · UniAD · setting=unified · I-AUROC"): (91.5, 85.5),
        ("multi-class VisA (picture)", "VisA · UniAD · setting=unified · I-AP"): (90.8, 85.46),
    }


def test_a_column_of_two_decimals_is_not_excused_by_its_neighbours_of_one():
    """98.36 against 98.35 is rounding at one decimal, and a disagreement (0.013) in a column of two."""
    (simplenet,) = [f for f in audit.audit() if "SimpleNet · setting=unified · I-AP" in f.what and "MVTec" in f.what]
    assert simplenet.verdict == "disagrees"
    units = audit._units(read_published())
    assert {unit for key, unit in units.items() if key[0] == "uninet_readme"} == {0.1, 0.01}
