"""Writes a rank's file of the report: a line of JSON an exchange, with its tensor and the comparison or the fault."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.header import Header

logger = logging.getLogger(__name__)

PATTERN = "graft-*.jsonl"
"""The files of all ranks in a report folder."""


class ReportWriter:
    """This rank's file; it is made, or made anew, with the first line.

    A line is one of: ``{"kind": "setting", ...}`` the configuration; ``"exchange"`` one tensor, with the comparison on
    the side that received it; ``"fault"`` an exchange that failed, and why; ``"summary"`` the counts, when the grafter
    closes.
    """

    def __init__(self, config: GrafterConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self.path = Path(config.report_dir) / f"graft-{config.role}-{rank}.jsonl"
        self._file: TextIO | None = None
        self._line_start = ""
        self.counts: Counter[str] = Counter()

    def exchange(
        self, header: Header, comparison: Comparison | None, outcome: str, num_bytes: int, seconds: float, why: str = ""
    ) -> None:
        """One tensor that was sent, received, observed, recorded or skipped (``outcome``; ``why``)."""
        self.counts[outcome] += 1
        more = vars(comparison) if comparison else {"why": why} if why else {}
        self._write(
            kind="exchange", **_tensor(header), outcome=outcome, bytes=num_bytes, seconds=round(seconds, 6), **more
        )

    def fault(self, header: Header, text: str) -> None:
        """An exchange that failed."""
        self.counts["faults"] += 1
        self._write(kind="fault", **_tensor(header), fault=text)

    def close(self) -> None:
        """Writes the counts, if there has been anything to count."""
        if self.counts:
            self._write(kind="summary", counts=dict(self.counts))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **fields: Any) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w", encoding="utf-8")
                self._write(**self._setting())
            self._file.write(self._line_start + json.dumps(_as_json(fields), default=str) + "\n")
            self._line_start = ""
            self._file.flush()
        except Exception as error:  # a full disk, or a folder that cannot be, is no reason to stop a model
            if not self.counts["lines lost"]:
                logger.warning("sgl_comm: grafter: lines of the report are lost: %s", error)
            self.counts["lines lost"] += 1
            self._line_start = "\n"  # half a line may have been written

    def _setting(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self._config).items() if name != "token"}
        return {
            "kind": "setting",
            **fields,
            "rank": self._rank,
            "layout": str(self._config.layout or ""),
            "time": time.time(),
        }


def _tensor(header: Header) -> dict[str, Any]:
    return {
        "sequence": header.sequence, "direction": header.direction, "name": header.name, "tags": header.tags,
        "dtype": header.dtype, "shape": list(header.shape), "layout": header.layout,
    }  # fmt: skip


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinities; they go as text, which ``float`` reads."""
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
