"""What the report says in every format: the head, the verdict, the columns and their cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sgl_comm.grafter.report.data import ReportData, Row, nonfinite_differ
from sgl_comm.grafter.report.labels import ranks_label, tags_label
from sgl_comm.grafter.report.reader import Fault

COLUMNS = (
    "", "seq", "dir", "name", "tags", "dtype", "outcome", "ranks", "rel_l2", "cosine", "max_abs", "max_ulp",
    "differing", "numel", "nan", "inf", "why",
)  # fmt: skip
"""Headings of the table of tensors. The first column has the marks ``FIRST_DIVERGES`` and ``DIVERGES``."""

FAULT_COLUMNS = ("role", "rank", "seq", "name", "tags", "fault")

TEXT_COLUMNS = frozenset({"", "dir", "name", "tags", "dtype", "outcome", "ranks", "why", "role", "fault"})
"""Columns that are aligned to the left; the others, most of them numbers, to the right."""

FIRST_DIVERGES, DIVERGES = ">>", "*"

LEGEND = (
    "Over the receiving ranks: the largest rel_l2, max_abs and max_ulp, the smallest cosine, the sums of the rest."
    " nan, inf: how many in theirs/ours."
)

_COUNTS = ("sent", "received", "observed", "recorded", "skipped", "unmatched", "faults")

Markup = Callable[[str], str]
"""What a format does to a text that comes out of the files."""


def head(report: ReportData, markup: Markup = str) -> list[str]:
    """The lines above the table: what the report is of."""
    tensors, compared = len(report.rows), sum(row.comparison is not None for row in report.rows)
    settings = [f"{role}: {markup(setting)}" for role, setting in report.settings.items()]
    return [f"folder: {markup(report.folder)}", *settings, f"tensors: {tensors}, of which {compared} were compared"]


def verdict(report: ReportData, markup: Markup = str) -> str:
    """In one sentence whether the two systems differ, and where first."""
    faults = f"; {_number_of(report.num_faults, 'fault')}" if report.num_faults else ""
    first, compared = report.first, sum(row.comparison is not None for row in report.rows)
    if first is not None:
        count = sum(row.diverges for row in report.rows)
        return (
            f"first divergence: {markup(tensor_label(first))}: {_reason(first, report.threshold)};"
            f" {count} of {compared} tensors diverge{faults}"
        )
    if not compared:
        return f"nothing was compared{faults}"
    return f"no divergence: rel_l2 is at most {report.threshold:g} in {_number_of(compared, 'tensor')}{faults}"


def tensor_label(tensor: Row | Fault) -> str:
    """Which tensor it is, in words."""
    name, tags = tensor.name or "(no name)", tags_label(tensor.tags)
    return " ".join(filter(None, [f"#{tensor.sequence} {tensor.direction}", name, tags]))


def row_cells(report: ReportData) -> list[list[tuple[str, str]]]:
    """Each row's cells as (column, text), in the order of ``COLUMNS``."""
    first = report.first
    marks = [FIRST_DIVERGES if row is first else DIVERGES if row.diverges else "" for row in report.rows]
    return [list(zip(COLUMNS, [mark, *_cells(row)], strict=True)) for mark, row in zip(marks, report.rows, strict=True)]


def fault_cells(fault: Fault) -> list[tuple[str, str]]:
    """A fault's cells as (column, text), in the order of ``FAULT_COLUMNS``."""
    cells = [fault.role, str(fault.rank), str(fault.sequence), fault.name or "-", tags_label(fault.tags) or "-"]
    return list(zip(FAULT_COLUMNS, [*cells, fault.text], strict=True))


def counts_text(counts: Mapping[str, int], markup: Markup = str) -> str:
    """A role's counts: those that a grafter has first, then what else the files hold."""
    names = [*(name for name in _COUNTS if name in counts), *sorted(set(counts) - set(_COUNTS))]
    return ", ".join(f"{markup(name) if name not in _COUNTS else name} {counts[name]}" for name in names) or "no counts"


def _reason(row: Row, threshold: float) -> str:
    comparison, reasons = row.comparison, []
    assert comparison is not None
    if not comparison.rel_l2 <= threshold:
        reasons.append(f"rel_l2 {comparison.rel_l2:.3g}, threshold {threshold:g}")
    if nonfinite_differ(comparison):
        pairs = zip(comparison.nan, comparison.inf, strict=True)
        theirs, ours = (f"{nans} NaN and {infs} infinities" for nans, infs in pairs)
        reasons.append(f"theirs has {theirs}, ours {ours}")
    return ", ".join(reasons) or "NaN or infinities are on other ranks in theirs than in ours"


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cells(row: Row) -> list[str]:
    each = row.comparison
    tensor = [str(row.sequence), row.direction, row.name or "-", tags_label(row.tags) or "-", row.dtype or "-"]
    outcome = [",".join(row.outcomes), ranks_label(row.ranks)]
    if each is None:
        return [*tensor, *outcome, *["-"] * 8, row.why]
    return [
        *tensor, *outcome, f"{each.rel_l2:.3g}", f"{each.cosine:.6f}", f"{each.max_abs:.3g}",
        "-" if each.max_ulp is None else str(each.max_ulp), str(each.differing), str(each.numel),
        "{}/{}".format(*each.nan), "{}/{}".format(*each.inf), row.why,
    ]  # fmt: skip
