"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from sgl_comm.grafter.report import wording
from sgl_comm.grafter.report.data import ReportData

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1b1f24; margin: 24px auto; max-width: 1280px; padding: 0 16px; }
h1 { font-size: 20px; } h2 { font-size: 16px; margin-top: 28px; }
.verdict { border-left: 5px solid #2b8a3e; background: #ebfbee; padding: 8px 12px; }
.verdict.failed { border-color: #c92a2a; background: #fff0f0; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font: 12px/1.4 ui-monospace, monospace; }
th, td { padding: 3px 8px; border-bottom: 1px solid #e3e6ea; text-align: left; white-space: nowrap; }
th { background: #f4f5f7; } td.number, th.number { text-align: right; }
td.why, td.fault { white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
tr.diverges td { background: #fff0f0; } tr.first td { background: #ffd8d8; font-weight: 600; }
.small { color: #57606a; font-size: 12px; }
""".strip()


def html(report: ReportData, plot_png: bytes | None, why_no_plot: str = "") -> str:
    """See ``Report.html``; ``why_no_plot`` is shown where ``plot_png`` is None."""
    failed = " failed" if report.failed else ""
    verdict = escape(wording.verdict(report))
    if report.first is not None:
        verdict = f'<a href="#first">{verdict}</a>'
    parts = [f'<h1>Graft report</h1>\n<p class="verdict{failed}">{verdict}</p>', _list(wording.head(report))]
    parts += ["<h2>Errors</h2>", _plot(plot_png, why_no_plot), "<h2>Tensors</h2>"]
    first, rows = report.first, []
    for row, cells in zip(report.rows, wording.row_cells(report), strict=True):
        attributes = (
            ' id="first" class="diverges first"' if row is first else ' class="diverges"' if row.diverges else ""
        )
        rows.append(_table_row(cells, attributes))
    parts += [_table(wording.COLUMNS, rows), f'<p class="small">{escape(wording.LEGEND)}</p>', "<h2>Faults</h2>"]
    faults = [_table_row(wording.fault_cells(fault)) for fault in report.faults]
    parts.append(_table(wording.FAULT_COLUMNS, faults) if faults else "<p>None.</p>")
    counts = [f"{role}: {wording.counts_text(counts)}" for role, counts in report.counts.items()]
    parts += ["<h2>Counts</h2>", _list(counts)]
    parts += ["<h2>Notes</h2>", _list(report.notes)] if report.notes else []
    head = (
        '<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>Graft report: {escape(report.folder)}</title>\n<style>\n{_STYLE}\n</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _plot(png: bytes | None, why_none: str) -> str:
    if png is None:
        return f"<p>There is no plot. {escape(why_none)}</p>"
    data = base64.b64encode(png).decode()
    return f'<img width="900" alt="relative L2 of each tensor" src="data:image/png;base64,{data}">'


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    headings = "".join(f"<th{_class(column)}>{escape(column)}</th>" for column in columns)
    return "\n".join(['<div class="wide"><table>', f"<tr>{headings}</tr>", *rows, "</table></div>"])


def _table_row(cells: Iterable[tuple[str, str]], attributes: str = "") -> str:
    return f"<tr{attributes}>{''.join(f'<td{_class(column)}>{escape(cell)}</td>' for column, cell in cells)}</tr>"


def _class(column: str) -> str:
    if column in ("why", "fault"):
        return f' class="{column}"'
    return "" if column in wording.TEXT_COLUMNS else ' class="number"'
