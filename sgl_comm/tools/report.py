"""The benchmark's figures as a table in the words of nccl-tests, and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_comm.tools import command_line
from sgl_comm.tools.timing import Timing


def significant(value: float, digits: int = 3) -> float:
    """``value`` rounded to this many significant digits."""
    return round(value, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0.0


def rounded(value: float) -> str:
    """``value`` as text: three significant digits, no exponent, and no more than two decimals from 0.1 on."""
    value = significant(value)
    decimals = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{min(decimals, 4)}f}"


@dataclasses.dataclass(frozen=True)
class Figures:
    """One contender at one size: times in microseconds a call, bandwidths in GB/s, wrong elements over all ranks."""

    name: str
    median_us: float
    p99_us: float
    algbw: float
    busbw: float
    wrong: int
    samples: int
    calls: int

    @classmethod
    def make(cls, name: str, timing: Timing, num_bytes: int, world: int, wrong: int) -> Figures:
        """Bandwidths follow nccl-tests: bytes / time, and that times 2 (n - 1) / n."""
        algbw = num_bytes / timing.median_us / 1e3
        busbw = algbw * 2 * (world - 1) / world
        times = significant(timing.median_us, 4), significant(timing.p99_us, 4)
        return cls(name, *times, significant(algbw), significant(busbw), wrong, timing.samples, timing.calls)


@dataclasses.dataclass(frozen=True)
class Row:
    """One size: this package's figures and those of the competitors that could do it."""

    size: int
    count: int
    type: str
    redop: str
    ours: Figures
    others: tuple[Figures, ...]

    @property
    def wrong(self) -> int:
        """Wrong elements of all contenders."""
        return sum(figures.wrong for figures in (self.ours, *self.others))

    def best(self) -> dict[str, Figures]:
        """The competitors by the first word of their name, the fastest algorithm of each."""
        found: dict[str, Figures] = {}
        for figures in self.others:
            family = figures.name.partition(" ")[0]
            if family not in found or figures.median_us < found[family].median_us:
                found[family] = figures
        return found

    def ratios(self) -> dict[str, float]:
        """For each competitor, its median time over ours."""
        return {name: significant(figures.median_us / self.ours.median_us) for name, figures in self.best().items()}


def print_setting(setting: Mapping[str, Any]) -> None:
    """What a table's figures were measured on, above it."""
    for name, value in setting.items():
        if value is not None:
            print(f"# {name}: {value}")


def write_json(file: Path | None, setting: Mapping[str, Any], rows: object) -> None:
    """A benchmark's figures and what they were measured on, if a file is wanted."""
    if file is not None:
        command_line.write(file, json.dumps({"environment": setting, "rows": rows}, indent=1) + "\n")


class Table:
    """Prints the setting at once, the headings with the first row, and each row as it comes."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self.setting = setting
        self.competitors: list[str] | None = None
        print_setting(setting)
        print(
            "# time, p99: over samples, each the slowest rank's mean; #wrong: over all ranks and contenders",
            flush=True,
        )

    def add(self, row: Row) -> None:
        """Prints one row."""
        best, ratios = row.best(), row.ratios()
        if self.competitors is None:
            self.competitors = list(best)
            self._print_headings()
        ours = row.ours
        line = f"{row.size:>12} {row.count:>12} {row.type:>9} {row.redop:>6}"
        line += (
            f" {rounded(ours.median_us):>9} {rounded(ours.p99_us):>9} {rounded(ours.algbw):>7} {rounded(ours.busbw):>7}"
        )
        line += f" {row.wrong:>7}"
        for name in self.competitors:
            time, ratio = (rounded(best[name].median_us), rounded(ratios[name])) if name in best else ("-", "-")
            line += f" {time:>9} {ratio:>7}"
        print(line, flush=True)

    def finish(self, rows: Sequence[Row]) -> None:
        """Prints the closing lines."""
        wrong = sum(row.wrong for row in rows)
        print(f"# wrong elements: {wrong}" + (" FAILED" if wrong else " OK"))

    def _print_headings(self) -> None:
        names = self.competitors or []
        form = f"sgl_comm, {self.setting['form']}"
        print(f"#{'':>42}{form:^44}{''.join(f'{name:^18}' for name in names)}".rstrip())
        heads = ["size", "count", "type", "redop", "time", "p99", "algbw", "busbw", "#wrong"]
        units = ["(B)", "(elements)", "", "", "(us)", "(us)", "(GB/s)", "(GB/s)", ""]
        widths = [11, 12, 9, 6, 9, 9, 7, 7, 7]
        for _ in names:
            heads, units, widths = [*heads, "time", "ratio"], [*units, "(us)", "(x)"], [*widths, 9, 7]
        for cells in (heads, units):
            print("#" + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


@contextlib.contextmanager
def progress(show: bool, text: str) -> Iterator[None]:
    """A line on the terminal while the block runs; nothing where stderr is no terminal."""
    show = show and sys.stderr.isatty()
    if show:
        print(f"\r{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if show:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def to_json(row: Row) -> dict[str, Any]:
    """All figures of a row, with what is computed from them."""
    return {**dataclasses.asdict(row), "ratios": row.ratios(), "wrong": row.wrong}
