"""The report as Markdown, with tables as GitHub has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sgl_comm.grafter.report import wording
from sgl_comm.grafter.report.data import ReportData

_MARKS = {wording.FIRST_DIVERGES: "**first**", wording.DIVERGES: "diverges", "": ""}
_PLAIN_FAULT_COLUMNS = ("role", "rank", "seq")


def markdown(report: ReportData) -> str:
    """See ``Report.markdown``."""
    lines = ["# Graft report", "", f"**{wording.verdict(report, _code)}**", ""]
    lines += [*(f"- {line}" for line in wording.head(report, _code)), ""]
    rows = [[_row_cell(column, cell) for column, cell in cells] for cells in wording.row_cells(report)]
    lines += _table(wording.COLUMNS, rows)
    lines += [wording.LEGEND, "", "## Faults", ""]
    faults = [
        [_code(cell, plain=column in _PLAIN_FAULT_COLUMNS) for column, cell in wording.fault_cells(fault)]
        for fault in report.faults
    ]
    lines += _table(wording.FAULT_COLUMNS, faults) if faults else ["None.", ""]
    lines += ["## Counts", ""]
    lines += [f"- {role}: {wording.counts_text(counts, _code)}" for role, counts in report.counts.items()]
    lines += ["", "## Notes", "", *(f"- {_escaped(note)}" for note in report.notes)] if report.notes else []
    return "\n".join(lines).rstrip() + "\n"


def _row_cell(column: str, cell: str) -> str:
    return _code(cell, plain=column not in ("name", "tags", "why")) if column else _MARKS[cell]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(column or " " for column in columns) + " |"]
    lines.append("|" + "|".join("---" if column in wording.TEXT_COLUMNS else "--:" for column in columns) + "|")
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _code(text: str, plain: bool = False) -> str:
    """As code, in which nothing has a meaning; as plain text where something might have one even there.

    With ``plain``, a word or a number stays as it is.
    """
    if not text or (plain and re.fullmatch(r"[A-Za-z0-9.+/,-]+", text)):
        return text
    return _escaped(text) if set("`|\\<") & set(text) else f"`{text}`"


def _escaped(text: str) -> str:
    """As plain text, in which nothing has a meaning."""
    return re.sub(r"[`*_\[\]<>|\\&#~$@!]|:(?=/)", lambda found: f"&#{ord(found[0])};", text)
