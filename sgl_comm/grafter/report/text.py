"""The report as text for a terminal."""

from __future__ import annotations

from sgl_comm.grafter.report import wording
from sgl_comm.grafter.report.data import ReportData
from sgl_comm.grafter.report.labels import shortened

_MAX_WIDTH = 64


def text(report: ReportData) -> str:
    """See ``Report.text``."""
    lines = [f"# {line}" for line in wording.head(report)]
    rows = [
        [shortened(cell, _MAX_WIDTH) if column != "why" else cell for column, cell in cells]
        for cells in wording.row_cells(report)
    ]
    table = [["#", *wording.COLUMNS[1:]], *rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells in table if rows else []:
        padded = [
            f"{cell:<{width}}" if column in wording.TEXT_COLUMNS else f"{cell:>{width}}"
            for column, cell, width in zip(wording.COLUMNS, cells, widths, strict=True)
        ]
        lines.append(" ".join(padded).rstrip())
    if any(row.diverges for row in report.rows):
        lines.append(f"# {wording.FIRST_DIVERGES} the first that diverges, {wording.DIVERGES} others that do")
    lines.append(f"# {wording.LEGEND}")
    lines.append(f"# faults: {report.num_faults}")
    for fault in report.faults:
        lines.append(f"#   {fault.role} rank {fault.rank}, {wording.tensor_label(fault)}: {fault.text}")
    lines += [f"# {role}: {wording.counts_text(counts)}" for role, counts in report.counts.items()]
    lines += [f"# note: {note}" for note in report.notes]
    return "\n".join([*lines, f"# {wording.verdict(report)}"]) + "\n"
