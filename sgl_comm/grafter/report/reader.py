"""Reads the files of a report folder, which ``ReportWriter`` writes, one a rank.

Anyone may have written them: they are JSON, and a line that is not as it should be is counted and left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.report.labels import printable
from sgl_comm.grafter.report.writer import PATTERN

RECEIVER = {"b2t": "target", "t2b": "baseline"}
"""Direction -> the role that receives."""

SHOWN_SETTINGS = ("mode", "backend", "layout", "b2t_filter", "t2b_filter")

_FILE = re.compile(r"graft-(baseline|target)-(\d{1,6})\.jsonl")
_MAX_DIGITS = 24
_MAX_WORLD = 1 << 16
_TEXTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One rank's line of one tensor; a rank that received it also has the comparison."""

    rank: int
    sequence: int
    direction: str
    name: str
    tags: dict[str, Any]
    dtype: str
    outcome: str
    receives: bool
    why: str = ""
    comparison: Comparison | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """One rank's line of an exchange that failed."""

    role: str
    rank: int
    sequence: int
    direction: str
    name: str
    tags: dict[str, Any]
    text: str


@dataclasses.dataclass
class RankFile:
    """One rank's file.

    Attributes:
        name: of the file.
        role, rank: whose it is, by its name.
        setting: of its configuration ``SHOWN_SETTINGS``, as text.
        worlds: role -> how many ranks its configuration gives it; only what is given.
        exchanges, faults: its lines, in their order.
        counts: its summary; None where there is none.
        unreadable: how many lines are left out.
    """

    name: str
    role: str
    rank: int
    setting: dict[str, str] = dataclasses.field(default_factory=dict)
    worlds: dict[str, int] = dataclasses.field(default_factory=dict)
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    counts: dict[str, int] | None = None
    unreadable: int = 0


def read_folder(folder: str | Path) -> tuple[list[RankFile], list[str]]:
    """The ranks' files, by role and rank; and the names of files that look alike but are no rank's.

    Raises:
        SglCommError: it is no folder, it has no such files, or one of them cannot be opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SglCommError(
            f"grafter: got report folder {str(folder)!r}, which is no folder; expected one with files {PATTERN}"
        )
    ours: list[tuple[str, int, Path]] = []
    others = []
    for path in sorted(folder.glob(PATTERN)):
        named = _FILE.fullmatch(path.name)
        if named and path.is_file():
            ours.append((named[1], int(named[2]), path))
        else:
            others.append(printable(path.name))
    if not ours:
        raise SglCommError(
            f"grafter: got report folder {str(folder)!r} without files graft-<role>-<rank>.jsonl; expected the lines of"
            " a grafter (GrafterConfig.report_dir)"
        )
    return [_read_file(path, role, rank) for role, rank, path in sorted(ours)], others


def _read_file(path: Path, role: str, rank: int) -> RankFile:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SglCommError(f"grafter: got {path}, which cannot be read ({error}); expected a rank's lines") from None
    file = RankFile(path.name, role, rank)
    for line in lines:
        if line.strip():
            try:
                _add_line(file, json.loads(line.decode(), parse_int=_short_int, parse_constant=_refuse))
            except (ValueError, RecursionError):
                file.unreadable += 1
    return file


def _short_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("a number of so many digits")
    return int(text)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _add_line(file: RankFile, fields: Any) -> None:
    if type(fields) is not dict:
        raise ValueError("no object")
    kind = fields.get("kind")
    if kind == "setting":
        # Both or neither: a line that is left out leaves nothing behind.
        setting = {name: text for name in SHOWN_SETTINGS if (text := _text(fields, name))}
        file.setting, file.worlds = setting, _worlds(fields)
    elif kind == "exchange":
        file.exchanges.append(_exchange(file, fields))
    elif kind == "fault":
        file.faults.append(Fault(file.role, file.rank, *_tensor(fields), _text(fields, "fault")))
    elif kind == "summary":
        counts = _take(fields, "counts", dict)
        file.counts = {printable(name): _count(counts, name) for name in counts}
    else:
        raise ValueError("no such kind of line")


def _worlds(fields: dict[str, Any]) -> dict[str, int]:
    worlds = {}
    for role in ("baseline", "target"):
        value = _take(fields, f"{role}_world_size", int, type(None))
        if value is not None:
            if not 1 <= value <= _MAX_WORLD:
                raise ValueError("no such number of ranks")
            worlds[role] = value
    return worlds


def _exchange(file: RankFile, fields: dict[str, Any]) -> Exchange:
    sequence, direction, name, tags = _tensor(fields)
    receives = RECEIVER[direction] == file.role
    comparison = _comparison(fields) if "rel_l2" in fields else None
    if comparison is not None and not receives:
        raise ValueError("a comparison by the sender")
    why = _text(fields, "why") if "why" in fields else ""
    dtype, outcome = _text(fields, "dtype"), _text(fields, "outcome")
    return Exchange(file.rank, sequence, direction, name, tags, dtype, outcome, receives, why, comparison)


def _tensor(fields: dict[str, Any]) -> tuple[int, str, str, dict[str, Any]]:
    direction = _take(fields, "direction", str)
    if direction not in RECEIVER:
        raise ValueError("no such direction")
    tags = {}
    for tag, value in _take(fields, "tags", dict).items():
        if type(value) not in (str, int, float, bool, type(None)):
            raise ValueError("a tag that is no text, number, boolean or None")
        tags[printable(tag)] = printable(value) if type(value) is str else value
    return _count(fields, "sequence"), direction, printable(_take(fields, "name", str)), tags


def _comparison(fields: dict[str, Any]) -> Comparison:
    cosine, rel_l2, max_abs = (_number(fields, name) for name in ("cosine", "rel_l2", "max_abs"))
    if abs(cosine) > 1 or rel_l2 < 0 or max_abs < 0:
        raise ValueError("a number out of range")
    max_ulp = None if _take(fields, "max_ulp", int, type(None)) is None else _count(fields, "max_ulp")
    numel, differing = _count(fields, "numel"), _count(fields, "differing")
    return Comparison(numel, differing, cosine, rel_l2, max_abs, max_ulp, _pair(fields, "nan"), _pair(fields, "inf"))


def _take(fields: dict[str, Any], name: str, *kinds: type) -> Any:
    value = fields.get(name)
    if type(value) not in kinds:  # a boolean is no int here
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    """A field's text, printable and on one line."""
    return printable(" ".join(_take(fields, name, str).split()))


def _count(fields: dict[str, Any], name: str) -> int:
    value = _take(fields, name, int)
    if value < 0:
        raise ValueError(f"{name} is below 0")
    return int(value)


def _number(fields: dict[str, Any], name: str) -> float:
    value = _take(fields, name, int, float, str)
    if type(value) is str:
        if value not in _TEXTS:
            raise ValueError(f"{name} is no number")
        return _TEXTS[value]
    return float(value)


def _pair(fields: dict[str, Any], name: str) -> tuple[int, int]:
    values = _take(fields, name, list)
    if len(values) != 2:
        raise ValueError(f"{name} is no pair")
    both = {"theirs": values[0], "ours": values[1]}
    return _count(both, "theirs"), _count(both, "ours")
