"""A report as text, Markdown and HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_comm.grafter.lines import Fault, printable

if TYPE_CHECKING:
    from sgl_comm.grafter.report import Report, Row

_HEADINGS = (
    "", "seq", "dir", "name", "tags", "dtype", "outcome", "ranks", "rel_l2", "cosine", "max_abs", "max_ulp",
    "differing", "numel", "nan", "inf", "why",
)  # fmt: skip
_LEFT = {"", "dir", "name", "tags", "dtype", "outcome", "ranks", "why"}
_FAULT_HEADINGS = ("role", "rank", "seq", "name", "tags", "fault")
_WIDEST = 64
_LEGEND = (
    "Over the receiving ranks: the largest rel_l2, max_abs and max_ulp, the smallest cosine, the sums of the rest."
    " nan, inf: how many in theirs/ours."
)
_COUNTS = ("sent", "received", "observed", "recorded", "skipped", "unmatched", "faults")

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


def text(report: Report) -> str:
    """See ``Report.text``."""
    lines = [f"# {line}" for line in _head(report)]
    rows = [[short(cell, _WIDEST) if name != "why" else cell for name, cell in cells] for cells in _named_cells(report)]
    table = [["#", *_HEADINGS[1:]], *rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEADINGS))]
    for cells in table if rows else []:
        padded = [
            f"{cell:<{width}}" if name in _LEFT else f"{cell:>{width}}"
            for name, cell, width in zip(_HEADINGS, cells, widths, strict=True)
        ]
        lines.append(" ".join(padded).rstrip())
    if any(row.diverges for row in report.rows):
        lines.append("# >> the first that diverges, * others that do")
    lines.append(f"# {_LEGEND}")
    lines.append(f"# faults: {report.num_faults}")
    for fault in report.faults:
        lines.append(f"#   {fault.role} rank {fault.rank}, {which(fault)}: {fault.text}")
    lines += [f"# {role}: {_counted(counts)}" for role, counts in report.counts.items()]
    lines += [f"# note: {note}" for note in report.notes]
    return "\n".join([*lines, f"# {_verdict(report)}"]) + "\n"


def markdown(report: Report) -> str:
    """See ``Report.markdown``."""
    lines = ["# Graft report", "", f"**{_verdict(report, _code)}**", ""]
    lines += [*(f"- {line}" for line in _head(report, _code)), ""]
    headings = [name or " " for name in _HEADINGS]
    lines += _markdown_table(headings, [[_marked(cell) for cell in cells] for cells in _named_cells(report)])
    lines += [_LEGEND, "", "## Faults", ""]
    faults = [
        [_code(cell, plain=index < 3) for index, cell in enumerate(_fault_cells(fault))] for fault in report.faults
    ]
    lines += _markdown_table(_FAULT_HEADINGS, faults) if faults else ["None.", ""]
    lines += ["## Counts", ""]
    lines += [f"- {role}: {_counted(counts, _code)}" for role, counts in report.counts.items()]
    lines += ["", "## Notes", "", *(f"- {_escaped(note)}" for note in report.notes)] if report.notes else []
    return "\n".join(lines).rstrip() + "\n"


def _marked(cell: tuple[str, str]) -> str:
    name, value = cell
    if name in ("name", "tags", "why"):
        return _code(value)
    return {">>": "**first**", "*": "diverges"}.get(value, value) if not name else _code(value, plain=True)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append(
        "|" + "|".join("---" if name.strip() in {*_LEFT, "role", "fault"} else "--:" for name in headings) + "|"
    )
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _code(value: str, plain: bool = False) -> str:
    """As code, in which nothing has a meaning; as plain text where something might have one even there.

    With ``plain``, as it is where it is a word or a number.
    """
    if not value or (plain and re.fullmatch(r"[A-Za-z0-9.+/,-]+", value)):
        return value
    return _escaped(value) if set("`|\\<") & set(value) else f"`{value}`"


def _escaped(value: str) -> str:
    """As plain text, in which nothing has a meaning."""
    return re.sub(r"[`*_\[\]<>|\\&#~$@!]|:(?=/)", lambda found: f"&#{ord(found[0])};", value)


def html(report: Report, image: bytes | str) -> str:
    """See ``Report.html``; ``image`` is the plot as PNG, or why there is none."""
    failed = " failed" if report.failed else ""
    verdict = escape(_verdict(report))
    if report.first is not None:
        verdict = f'<a href="#first">{verdict}</a>'
    parts = [f'<h1>Graft report</h1>\n<p class="verdict{failed}">{verdict}</p>', _html_list(_head(report))]
    parts += ["<h2>Errors</h2>", _html_plot(image), "<h2>Tensors</h2>"]
    first, rows = report.first, []
    for row, cells in zip(report.rows, _named_cells(report), strict=True):
        attributes = (
            ' id="first" class="diverges first"' if row is first else ' class="diverges"' if row.diverges else ""
        )
        rows.append(_html_row(cells, attributes))
    parts += [_html_table(_HEADINGS, rows), f'<p class="small">{escape(_LEGEND)}</p>', "<h2>Faults</h2>"]
    faults = [_html_row(zip(_FAULT_HEADINGS, _fault_cells(fault), strict=True)) for fault in report.faults]
    parts.append(_html_table(_FAULT_HEADINGS, faults) if faults else "<p>None.</p>")
    parts += ["<h2>Counts</h2>", _html_list(f"{role}: {_counted(counts)}" for role, counts in report.counts.items())]
    parts += ["<h2>Notes</h2>", _html_list(report.notes)] if report.notes else []
    head = (
        '<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>Graft report: {escape(report.folder)}</title>\n<style>\n{_STYLE}\n</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html_plot(image: bytes | str) -> str:
    if isinstance(image, str):
        return f"<p>There is no plot. {escape(image)}</p>"
    data = base64.b64encode(image).decode()
    return f'<img width="900" alt="relative L2 of each tensor" src="data:image/png;base64,{data}">'


def _html_list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _html_table(headings: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f"<th{_html_class(name)}>{escape(name)}</th>" for name in headings)
    return "\n".join(['<div class="wide"><table>', f"<tr>{heads}</tr>", *rows, "</table></div>"])


def _html_row(cells: Iterable[tuple[str, str]], attributes: str = "") -> str:
    return f"<tr{attributes}>{''.join(f'<td{_html_class(name)}>{escape(cell)}</td>' for name, cell in cells)}</tr>"


def _html_class(name: str) -> str:
    if name in ("why", "fault"):
        return f' class="{name}"'
    return "" if name in {*_LEFT, "role"} else ' class="number"'


def _head(report: Report, shown: Any = str) -> list[str]:
    tensors, compared = len(report.rows), sum(row.comparison is not None for row in report.rows)
    settings = [f"{role}: {shown(setting)}" for role, setting in report.settings.items()]
    return [f"folder: {shown(report.folder)}", *settings, f"tensors: {tensors}, of which {compared} were compared"]


def _verdict(report: Report, shown: Any = str) -> str:
    """In one sentence; ``shown`` is done to what is a tensor's."""
    faults = f"; {_number_of(report.num_faults, 'fault')}" if report.num_faults else ""
    first, compared = report.first, sum(row.comparison is not None for row in report.rows)
    if first is not None:
        count = sum(row.diverges for row in report.rows)
        return (
            f"first divergence: {shown(which(first))}: {_reason(first, report.threshold)};"
            f" {count} of {compared} tensors diverge{faults}"
        )
    if not compared:
        return f"nothing was compared{faults}"
    return f"no divergence: rel_l2 is at most {report.threshold:g} in {_number_of(compared, 'tensor')}{faults}"


def _reason(row: Row, threshold: float) -> str:
    each, reasons = row.comparison, []
    assert each is not None
    if not each.rel_l2 <= threshold:
        reasons.append(f"rel_l2 {each.rel_l2:.3g}, threshold {threshold:g}")
    if each.nan[0] != each.nan[1] or each.inf[0] != each.inf[1]:
        theirs, ours = (f"{nans} NaN and {infs} infinities" for nans, infs in zip(each.nan, each.inf, strict=True))
        reasons.append(f"theirs has {theirs}, ours {ours}")
    return ", ".join(reasons) or "NaN or infinities are on other ranks in theirs than in ours"


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _named_cells(report: Report) -> list[list[tuple[str, str]]]:
    first = report.first
    marks = [">>" if row is first else "*" if row.diverges else "" for row in report.rows]
    return [
        list(zip(_HEADINGS, [mark, *_cells(row)], strict=True)) for mark, row in zip(marks, report.rows, strict=True)
    ]


def _cells(row: Row) -> list[str]:
    each = row.comparison
    which_one = [str(row.sequence), row.direction, row.name or "-", tags(row.tags) or "-", row.dtype or "-"]
    came = [",".join(row.outcomes), ranks(row.ranks)]
    if each is None:
        return [*which_one, *came, *["-"] * 8, row.why]
    return [
        *which_one, *came, f"{each.rel_l2:.3g}", f"{each.cosine:.6f}", f"{each.max_abs:.3g}",
        "-" if each.max_ulp is None else str(each.max_ulp), str(each.differing), str(each.numel),
        "{}/{}".format(*each.nan), "{}/{}".format(*each.inf), row.why,
    ]  # fmt: skip


def _fault_cells(fault: Fault) -> list[str]:
    return [fault.role, str(fault.rank), str(fault.sequence), fault.name or "-", tags(fault.tags) or "-", fault.text]


def _counted(counts: Mapping[str, int], shown: Any = str) -> str:
    names = [*(name for name in _COUNTS if name in counts), *sorted(set(counts) - set(_COUNTS))]
    return ", ".join(f"{shown(name) if name not in _COUNTS else name} {counts[name]}" for name in names) or "no counts"


def which(one: Row | Fault) -> str:
    """Which tensor it is, in words."""
    return " ".join(filter(None, [f"#{one.sequence} {one.direction}", one.name or "(no name)", tags(one.tags)]))


def tags(of: Mapping[str, Any]) -> str:
    """Tags as text without spaces of its own."""
    return ",".join(f"{name}={value}" for name, value in of.items())


def ranks(of: Iterable[int]) -> str:
    """Ranks as text: "0-3,5"."""
    runs: list[list[int]] = []
    for rank in sorted(of):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def shown_path(path: str | Path) -> str:
    """A path as it may be printed."""
    return printable(str(path))


def short(value: str, length: int) -> str:
    """Without its middle, where it is longer."""
    half = length // 2 - 1
    return value if len(value) <= length else f"{value[:half]}…{value[-half:]}"
