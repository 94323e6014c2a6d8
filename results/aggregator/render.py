"""Print a table: terminal (rich), Markdown, CSV, LaTeX (booktabs), HTML."""

from __future__ import annotations

import csv
import functools
import html
import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from results.aggregator.reference import MARK
from results.aggregator.table import Cell, Column, Row, Table, Value
from results.common.shown import printable, spelled

FORMATS = ("terminal", "markdown", "csv", "latex", "html")
SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex", "html": "html"}
DASH = "–"
LONG_NOTES = 4000
"""Characters of notes below a LaTeX table above which they run on in smaller letters."""
#: Columns of the CSV output: the long schema of the published tables, and beside it what our runs say.
CSV_COLUMNS = (
    "row", "group", "column", "source", "table", "dataset", "category", "method", "variant", "metric", "published",
    "published_std", "published_gap", "value", "std", "n", "gap", "difference", "mark", "default", "reference", "missing",
    "records",
)  # fmt: skip
_PREAMBLE = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage{booktabs,graphicx}
\usepackage[a4paper,margin=2cm]{geometry}
"""


def number_text(value: Value | None, column: Column, show_n: bool = False) -> str:
    """`97.1 ± 0.3 (−1.2)`, with `[n=2]` where fewer seeds than elsewhere; a dash if there is no value."""
    if value is None or value.mean is None:
        return DASH
    if column.scientific:
        text = _significant(value.mean, 3) + (f" ± {_significant(value.std, 2)}" if value.std is not None else "")
    else:
        text = f"{value.mean:.{column.digits}f}"
        if value.std is not None:
            text += f" ± {value.std:.{max(column.digits, 2) if value.printed else column.digits}f}"
    if value.gap is not None:
        gap = f"{value.gap:.{column.digits}f}" if value.printed else signed(value.gap, column.digits)
        text += f" ({gap})"
    if show_n and value.n is not None:
        text += f" [n={value.n}]"
    if value.reference:
        text += MARK
    return text.replace("-", "−") if not column.scientific else text


def _significant(value: float, digits: int) -> str:
    """Rounded to so many digits, and with the zeros of a large number: 1230, not 1.23e+03."""
    return f"{float(f'{value:.{digits}g}'):g}"


def signed(value: float, digits: int) -> str:
    """A difference with a true minus sign, and no minus before zero."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def cell_text(cell: Cell, table: Table, column: Column, decorate: Callable[[str, str], str]) -> str:
    """A cell's text; `decorate(text, mark)` puts best and second best in the output's own way."""
    return " | ".join(decorate(text, mark) + after for text, mark, after in shown_numbers(cell, table, column))


def shown_numbers(cell: Cell, table: Table, column: Column) -> list[tuple[str, str, str]]:
    """What stands in a cell: a number, its mark, and after it the difference to the paper's; two where both stand."""
    seeds = None if cell.runs is None else cell.runs.n
    show_n = seeds is not None and seeds < max(table.seeds, default=0)
    ours = number_text(cell.main, column, show_n), cell.main.mark
    if table.source != "both" or cell.published is None or cell.runs is None:
        return [(*ours, "")]
    difference = "" if cell.difference is None else f" ({signed(cell.difference, column.digits)})"
    return [(number_text(cell.published, column), cell.published.mark, ""), (*ours, difference)]


def render(table: Table, form: str) -> str:
    """The table as text in one of `FORMATS`; raises ValueError for another."""
    makers = {"terminal": terminal, "markdown": markdown, "csv": csv_text, "latex": latex, "html": html_text}
    if form not in makers:
        raise ValueError(f"format {form!r} is unknown; choose from {', '.join(makers)}")
    return makers[form](table)


def terminal(table: Table, width: int | None = None) -> str:
    """The table drawn by rich, with ANSI marks, for a terminal of `width` characters (default: this one's)."""
    console = Console(width=width or Console().width, record=True, file=io.StringIO())
    print_table(table, console)
    return console.export_text(styles=True)


def print_table(table: Table, console: Console) -> None:
    """Print the table with its caption, its warnings above and what is missing below, in blocks if it is too wide."""
    for warning in table.warnings:
        console.print(f"[bold red]{escape(warning)}[/]", soft_wrap=True)
    console.print(f"[bold]{escape(table.title)}[/]", highlight=False)
    for block in _blocks(table, console.width):
        groups = {table.columns[n].group for n in block}
        if len(groups) == 1 and groups != {""}:
            console.print(f"\n[italic]{escape(min(groups))}[/]", highlight=False)
        console.print(_grid(table, block, len(groups) > 1, console.width), soft_wrap=True)
    console.print(f"[dim]{escape(table.caption)}[/]", highlight=False)
    for note in table.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    for text in missing_lines(table):
        console.print(f"[yellow]{escape(text)}[/]", highlight=False)


def _grid(table: Table, block: Sequence[int], show_groups: bool, width: int) -> RichTable:
    """Some columns of the table beside the names of its rows, which are folded where `width` has no room for both."""
    names, widths = _widths(table)
    fits = names + sum(widths[n] for n in block) <= width
    columns = [table.columns[n] for n in block]
    grid = RichTable(header_style="bold")
    for header in table.row_headers:
        grid.add_column(escape(header), no_wrap=fits, overflow="fold")
    for n, column in zip(block, columns, strict=True):
        heads = (column.group if show_groups else "", column.label)
        grid.add_column(escape("\n".join(filter(None, heads))), justify="right", no_wrap=True, min_width=widths[n] - 3)
    styles = {"best": "[bold]{}[/]", "second": "[underline]{}[/]", "": "{}"}
    for row, line in zip(table.rows, table.cells, strict=True):
        if starts_group(table, row):
            grid.add_section()
            if row.group:
                grid.add_row(f"[italic]{escape(row.group)}[/]")
        elif row.rule:
            grid.add_section()
        texts = [
            cell_text(line[n], table, column, lambda text, mark: styles[mark].format(escape(text)))
            for n, column in zip(block, columns, strict=True)
        ]
        grid.add_row(*map(escape, labels(row)), *texts)
    return grid


def _blocks(table: Table, width: int) -> list[list[int]]:
    """Numbers of the columns that stand side by side: all if `width` has room, else a named group for itself."""
    if natural_width(table) <= width:
        return [list(range(len(table.columns)))]
    names, widths = _widths(table)
    if names + max(widths, default=0) > width:  # the names are folded to make room
        names = min(names, max(width // 2, width - sum(widths)))
    blocks: list[list[int]] = []
    for _, members in itertools.groupby(range(len(table.columns)), key=lambda n: table.columns[n].group):
        used = width
        for n in members:
            if used + widths[n] > width:
                blocks.append([])
                used = names
            blocks[-1].append(n)
            used += widths[n]
    return blocks


def markdown_frame(heads: Sequence[str], rows: Iterable[Sequence[str]], names: int) -> list[str]:
    """The lines of a GitHub table, its first `names` columns flush left, the numbers flush right; texts are escaped."""
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return [lines[0], "|" + "---|" * names + "---:|" * (len(heads) - names), *lines[1:]]


def markdown(table: Table) -> str:
    """A GitHub table; best bold, second best underlined."""
    marks = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    lines = [f"**{_md(table.title)}**", ""]
    lines += [line for warning in table.warnings for line in (f"> **{_md(warning)}**", ">")][:-1]
    lines += [""] * bool(table.warnings)
    heads = [*table.row_headers, *(f"{c.group} {c.label}".strip() for c in table.columns)]
    rows = []
    for row, line in zip(table.rows, table.cells, strict=True):
        if starts_group(table, row) and row.group:
            rows.append([f"*{_md(row.group)}*", *[""] * (len(heads) - 1)])
        texts = [
            cell_text(cell, table, column, lambda text, mark: marks[mark].format(text)).replace("|", "\\|")
            for column, cell in zip(table.columns, line, strict=True)
        ]
        rows.append([*map(_md, labels(row)), *texts])
    lines += markdown_frame(list(map(_md, heads)), rows, len(table.row_headers))
    lines += ["", _md(table.caption)] if table.caption else []
    for note in table.notes:
        lines += ["", _md(note)]
    missing = missing_lines(table)
    if missing:
        lines += ["", _md(missing[0]), "", *(f"- {_md(text.strip())}" for text in missing[1:])]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """One line per cell: `CSV_COLUMNS`; numbers with every digit, empty where there is none."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row, line in zip(table.rows, table.cells, strict=True):
        for column, cell in zip(table.columns, line, strict=True):
            ours, printed = cell.runs, cell.published
            writer.writerow(
                {
                    **{name: cell.key.get(name, "") for name in CSV_COLUMNS[3:10]},
                    "row": " / ".join(row.labels),
                    "group": row.group,
                    "column": f"{column.group} {column.label}".strip(),
                    "published": _plain(printed and printed.mean),
                    "published_std": _plain(printed and printed.std),
                    "published_gap": _plain(printed and printed.gap),
                    "value": _plain(ours and ours.mean),
                    "std": _plain(ours and ours.std),
                    "n": "" if ours is None or ours.n is None else ours.n,
                    "gap": _plain(ours and ours.gap),
                    "difference": _plain(cell.difference),
                    "mark": cell.main.mark,
                    "default": "yes" if row.default else "",
                    "reference": "yes" if ours and ours.reference else "",
                    "missing": cell.main.reason,
                    "records": " ".join(ours.records) if ours else "",
                }
            )
    return stream.getvalue()


def latex(table: Table, standalone: bool = False) -> str:
    """A booktabs table environment (needs the packages booktabs and graphicx); `standalone` makes it a document."""
    width = len(table.row_headers) + len(table.columns)
    wide = width > 7 or natural_width(table) > 95
    lines = ["\\begin{table}[htbp]", "\\centering"]
    lines.append(f"\\caption{{{tex(table.title.rstrip('.') + '.')}}}")
    lines.append(f"\\label{{tab:{table.name.replace('_', '-')}}}\\smallskip")
    lines += ["\\resizebox{\\linewidth}{!}{%"] * wide
    lines.append(f"\\begin{{tabular}}{{{'l' * len(table.row_headers)}{'r' * len(table.columns)}}}")
    lines.append("\\toprule")
    groups = group_spans(table)
    if groups:
        first, rules, position = [""] * len(table.row_headers), [], len(table.row_headers) + 1
        for group, span in groups:
            first.append(f"\\multicolumn{{{span}}}{{c}}{{{tex(group)}}}")
            if group:
                rules.append(f"\\cmidrule(lr){{{position}-{position + span - 1}}}")
            position += span
        lines.append(" & ".join(first) + " \\\\")
        lines.append("".join(rules))
    lines.append(" & ".join(map(tex, [*table.row_headers, *(column.label for column in table.columns)])) + " \\\\")
    lines.append("\\midrule")
    marks = {"best": "\\textbf{{{}}}", "second": "\\underline{{{}}}", "": "{}"}
    for number, (row, line) in enumerate(zip(table.rows, table.cells, strict=True)):
        starts = starts_group(table, row)
        if number and (starts or row.rule):
            lines.append("\\midrule")
        if starts and row.group:
            lines.append(f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{tex(row.group)}}}}} \\\\")
        texts = [
            cell_text(cell, table, column, lambda text, mark: marks[mark].format(tex(text)))
            for column, cell in zip(table.columns, line, strict=True)
        ]
        texts = [text.replace(" | ", " $|$ ") for text in texts]
        lines.append(" & ".join([*map(tex, labels(row)), *(_tex_signs(text) for text in texts)]) + " \\\\")
    lines.append("\\bottomrule")
    lines.append("\\end{tabular}" + "}" * wide)
    notes, size = _latex_notes(table), "footnotesize"
    if sum(map(len, notes)) > LONG_NOTES:  # so that table and notes stay on one page
        notes, size = [" ".join(notes)], "scriptsize"
    lines += [line for note in notes for line in ("", "\\smallskip", f"\\parbox{{\\linewidth}}{{\\{size} {note}}}")]
    lines.append("\\end{table}")
    text = "\n".join(lines) + "\n"
    return f"{_PREAMBLE}\\begin{{document}}\n{text}\\end{{document}}\n" if standalone else text


def _latex_notes(table: Table) -> list[str]:
    """What stands below a LaTeX table: warnings in bold, how it was made, notes, what is missing."""
    missing = missing_lines(table)
    notes = [table.caption, *table.notes, *([_shortened(missing)] if missing else [])]
    texts = [f"\\textbf{{{tex(warning)}}}" for warning in table.warnings] + [tex(note) for note in notes if note]
    return [re.sub(r"\S{40,}", lambda path: re.sub(r"(\\_|/)", r"\1\\allowbreak{}", path[0]), text) for text in texts]


def latex_document(names: Sequence[str]) -> str:
    """A document that inputs the named table files, for a look at all of them."""
    inputs = "".join(f"\\input{{{name}}}\n\\clearpage\n" for name in names)
    return f"{_PREAMBLE}\\begin{{document}}\n{inputs}\\end{{document}}\n"


@functools.cache
def template() -> Any:
    """The macros `table` and `page` of report.html.j2, as functions that return HTML."""
    here = Path(__file__).parent
    loader = FileSystemLoader(here)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    helpers = (
        anchor, group_spans, labels, missing_lines, origin, print_width, record_id, shown_numbers, starts_group,
    )  # fmt: skip
    environment.globals.update({helper.__name__: helper for helper in helpers})
    environment.globals["file"] = lambda name: Markup((here / name).read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").module


def html_text(table: Table) -> str:
    """An HTML table; every number carries where it comes from in its title and, for runs, links to their records."""
    return str(template().table(table))


def origin(cell: Cell, row: Row, column: Column) -> str:
    """What a number is and where it comes from, a line each."""
    lines = [f"{' / '.join(row.labels)} · {f'{column.group} {column.label}'.strip()}"]
    if cell.published is not None:
        lines.append(f"paper: {cell.published.note or cell.published.reason}")
    if cell.runs is not None:
        lines.append(f"n = {cell.runs.n} seeds" if cell.runs.mean is not None else cell.runs.reason)
        lines += cell.runs.records
    return "\n".join(filter(None, lines))


def print_width(table: Table) -> str:
    """The class of a table that needs small letters to keep its columns on a printed page, else nothing."""
    characters = natural_width(table)
    return " widest" if characters > 260 else " wide" if characters > 150 else ""


def record_id(name: str) -> str:
    """Anchor of a record's block in the report; report.js makes the same."""
    return f"record-{anchor(name)}"


def anchor(name: str) -> str:
    """The name as the end of an element's id."""
    return name.replace("/", "--").replace("=", "-").replace(",", "-")


def labels(row: Row) -> list[str]:
    """The row's labels, the first one with a star if it is the default."""
    return [f"{row.labels[0]} ★", *row.labels[1:]] if row.default else list(row.labels)


def group_spans(table: Table) -> list[tuple[str, int]]:
    """The groups of columns from left to right and how many columns each spans; empty if none has a name."""
    groups = itertools.groupby(column.group for column in table.columns)
    return [(group, len(list(members))) for group, members in groups] if any(c.group for c in table.columns) else []


def starts_group(table: Table, row: Row) -> bool:
    """Whether the row's group is another than that of the row above."""
    index = next(i for i, other in enumerate(table.rows) if other is row)
    return row.group != (table.rows[index - 1].group if index else "")


def missing_lines(table: Table) -> list[str]:
    """A heading and a line for each value that a dash stands for; empty if there is none."""
    if not table.missing:
        return []
    return [
        f"Missing (dashes are never averaged over), {len(table.missing)}:",
        *(f"  {text}" for text in table.missing),
    ]


def _shortened(lines: Sequence[str], limit: int = 12) -> str:
    head = [line.strip() for line in lines[: limit + 1]]
    rest = len(lines) - len(head)
    return head[0] + " " + "; ".join(head[1:]) + (f"; and {rest} more, see the CSV file" if rest > 0 else "") + "."


def natural_width(table: Table) -> int:
    """Characters that the table needs on a terminal to stand in one block."""
    names, widths = _widths(table)
    return names + sum(max(3 + len(c.group), width) for c, width in zip(table.columns, widths, strict=True))


def _widths(table: Table) -> tuple[int, list[int]]:
    """Characters that the names of the rows, with the frame, and each column need on a terminal."""
    groups = [row.group for row in table.rows if row.group]
    names = [max(map(len, texts)) for texts in zip(table.row_headers, *map(labels, table.rows), strict=True)]
    names[:1] = [max(names[0], *map(len, groups))] if names and groups else names[:1]
    cells = zip(*table.cells, strict=True) if table.cells else [()] * len(table.columns)
    widths = [
        3 + max([len(column.label), *(len(cell_text(cell, table, column, lambda text, _: text)) for cell in line)])
        for column, line in zip(table.columns, cells, strict=True)
    ]
    return sum(3 + name for name in names) + 1, widths


def _plain(value: Any) -> str:
    return "" if value is None else repr(round(value, 10))


def _md(text: str) -> str:
    """Text for Markdown: no HTML, no link, no emphasis comes of it, and it stays in its line."""
    plain = html.escape(" ".join(printable(text).split("\n")), quote=False).replace("&amp;", "&")
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", plain) if "&" in text else plain
    for sign in ("|", "*", "`"):
        plain = plain.replace(sign, f"\\{sign}")
    return re.sub(r"\](?=[(\[:])", r"\]", plain)


_TEX = {"\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
        "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "±": "$\\pm$",
        "−": "$-$", "–": "--", "★": "$\\star$", "×": "$\\times$", "λ": "$\\lambda$", "α": "$\\alpha$", "β": "$\\beta$",
        "θ": "$\\theta$", "Δ": "$\\Delta$", "↓": "$\\downarrow$", "↑": "$\\uparrow$", "≥": "$\\geq$", "≤": "$\\leq$",
        "✓": "$\\surd$", "†": "$^\\dagger$"}  # fmt: skip


def tex(text: str) -> str:
    """Text for LaTeX: special characters escaped, signs as mathematics.

    What a plain LaTeX has no letters for (Chinese, Greek outside of mathematics, control characters) stands as its code,
    like `u6728`.
    """
    return "".join(_TEX.get(character) or _tex_letter(character) for character in text)


def _tex_letter(character: str) -> str:
    if character == "\n":
        return " "
    known = character.isprintable() and (character in "–—‘’“”„…€" or ord(character) < 0x180)
    return character if known else f"\\texttt{{{spelled(character).removeprefix(chr(92))}}}"


def _tex_signs(text: str) -> str:
    return text.replace("−", "$-$")
