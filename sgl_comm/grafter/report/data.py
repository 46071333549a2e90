"""The lines of all ranks merged into one row a tensor: where do the two systems begin to differ?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.report.labels import printable, ranks_label
from sgl_comm.grafter.report.reader import Exchange, Fault, RankFile, read_folder

DEFAULT_THRESHOLD = 1e-4
"""The largest ``rel_l2`` of a tensor that does not diverge, unless another one is given."""

_SHOWN_RANKS = 8

_Data = TypeVar("_Data", bound="ReportData")


@dataclasses.dataclass(frozen=True)
class Row:
    """One exchanged tensor, merged over the ranks that received it; over the senders where no receiver has a line.

    Attributes:
        sequence, direction, name, tags: which tensor.
        dtype: the receivers'.
        outcomes: what became of it, each once: "received", "observed", "skipped"; "sent" or "recorded" of senders.
        ranks: whose lines these are.
        why: why it was skipped.
        comparison: of all ranks: the largest ``rel_l2``, ``max_abs`` and ``max_ulp``, the smallest ``cosine``, the sums
            of the rest; a NaN stays one. None where nothing was compared.
        diverges: whether on any rank ``rel_l2`` is above the threshold or NaN, or NaNs or infinities are not as many in
            theirs as in ours.
    """

    sequence: int
    direction: str
    name: str
    tags: dict[str, Any]
    dtype: str
    outcomes: tuple[str, ...]
    ranks: tuple[int, ...]
    why: str
    comparison: Comparison | None
    diverges: bool


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What the files of a report folder hold, merged over the ranks.

    Attributes:
        folder: as it was given.
        threshold: what ``rel_l2`` may be.
        rows: in order of their sequence.
        faults: the exchanges that failed, in order of their sequence.
        settings: role -> its ranks and how they were configured, in words.
        counts: role -> the sums of its ranks' summaries.
        notes: what is missing from the files, in words.
    """

    folder: str
    threshold: float
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    settings: dict[str, str]
    counts: dict[str, dict[str, int]]
    notes: tuple[str, ...]

    @classmethod
    def read(cls: type[_Data], folder: str | Path, threshold: float = DEFAULT_THRESHOLD) -> _Data:
        """The report of a folder with files ``graft-<role>-<rank>.jsonl``.

        Raises:
            SglCommError: it is no folder, it has no such files, one cannot be opened; or the threshold is no number.
        """
        if not 0 <= threshold < math.inf:
            raise SglCommError(f"grafter: got threshold {threshold!r} for a report; expected a number from 0 on")
        files, others = read_folder(folder)
        faults = [fault for file in files for fault in file.faults]
        return cls(
            printable(str(folder)),
            threshold,
            tuple(_rows(files, threshold)),
            tuple(sorted(faults, key=lambda fault: (fault.sequence, fault.role, fault.rank))),
            {role: _setting(of_role) for role, of_role in _by_role(files).items()},
            {role: _counts(of_role) for role, of_role in _by_role(files).items()},
            (*_notes(files), *(f"{name} is left out: it is no graft-<role>-<rank>.jsonl" for name in others)),
        )

    @property
    def first(self) -> Row | None:
        """The first row that diverges."""
        return next((row for row in self.rows if row.diverges), None)

    @property
    def num_faults(self) -> int:
        """How many there were, by the lines or by the summaries: either may be missing some."""
        return max(len(self.faults), sum(counts.get("faults", 0) for counts in self.counts.values()))

    @property
    def failed(self) -> bool:
        """Whether anything diverges, or any exchange failed."""
        return self.first is not None or self.num_faults > 0


def _by_role(files: Iterable[RankFile]) -> dict[str, list[RankFile]]:
    found: dict[str, list[RankFile]] = defaultdict(list)
    for file in files:
        found[file.role].append(file)
    return dict(found)


def _rows(files: Iterable[RankFile], threshold: float) -> list[Row]:
    lines: dict[tuple[int, str, str, str], list[Exchange]] = defaultdict(list)
    for file in files:
        for line in file.exchanges:
            lines[line.sequence, line.direction, line.name, json.dumps(line.tags, sort_keys=True)].append(line)
    return [_row(lines[key], threshold) for key in sorted(lines)]


def _row(lines: Sequence[Exchange], threshold: float) -> Row:
    shown = [line for line in lines if line.receives] or lines
    compared = [line.comparison for line in shown if line.comparison is not None]
    first = shown[0]
    return Row(
        first.sequence,
        first.direction,
        first.name,
        first.tags,
        first.dtype,
        tuple(dict.fromkeys(line.outcome for line in shown)),
        tuple(sorted({line.rank for line in shown})),
        next((line.why for line in shown if line.why), ""),
        _merged(compared) if compared else None,
        any(_diverges(each, threshold) for each in compared),
    )


def _diverges(each: Comparison, threshold: float) -> bool:
    return nonfinite_differ(each) or not each.rel_l2 <= threshold  # a NaN is not


def nonfinite_differ(comparison: Comparison) -> bool:
    """Whether NaNs or infinities are not as many in theirs as in ours."""
    return comparison.nan[0] != comparison.nan[1] or comparison.inf[0] != comparison.inf[1]


def _merged(compared: Sequence[Comparison]) -> Comparison:
    ulps = [each.max_ulp for each in compared if each.max_ulp is not None]
    return Comparison(
        sum(each.numel for each in compared),
        sum(each.differing for each in compared),
        -largest(-each.cosine for each in compared),
        largest(each.rel_l2 for each in compared),
        largest(each.max_abs for each in compared),
        max(ulps) if ulps else None,
        (sum(each.nan[0] for each in compared), sum(each.nan[1] for each in compared)),
        (sum(each.inf[0] for each in compared), sum(each.inf[1] for each in compared)),
    )


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _setting(files: Sequence[RankFile]) -> str:
    """How the ranks of one role were configured, in words."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for file in files:
        for name, text in file.setting.items():
            values[name][text] = None
    words = [f"{name} {' or '.join(texts)}" for name, texts in values.items()]
    return ", ".join([f"ranks {ranks_label([file.rank for file in files])}", *words])


def _counts(files: Iterable[RankFile]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.counts or {})
    return dict(counts)


def _notes(files: Sequence[RankFile]) -> list[str]:
    notes = []
    for file in files:
        if file.unreadable:
            lines = "1 line" if file.unreadable == 1 else f"{file.unreadable} lines"
            notes.append(f"{lines} of {file.name} could not be read")
        if file.counts is None:
            notes.append(
                f"{file.name} has no summary, so its counts are missing: the process has not closed its grafter"
            )
        elif lost := file.counts.get("lines lost"):
            notes.append(f"{file.role} rank {file.rank} could not write all of its lines ({lost} lost)")
    for role, of_role in _by_role(files).items():
        worlds = sorted({world for file in files if (world := file.worlds.get(role))})
        if len(worlds) > 1:
            numbers = ", ".join(map(str, worlds))
            notes.append(f"the files give the {role} different numbers of ranks ({numbers}): they are of several runs")
        there = {file.rank for file in of_role}
        missing = [rank for rank in range(worlds[-1] if worlds else 0) if rank not in there]
        if missing:
            more = f" and {len(missing) - _SHOWN_RANKS} more" if len(missing) > _SHOWN_RANKS else ""
            notes.append(f"there is no file of {role} rank {ranks_label(missing[:_SHOWN_RANKS])}{more}")
    return notes
