"""Report folders for tests: files as grafters write them, of runs that never were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.header import Header
from sgl_comm.grafter.report import ReportWriter

EQUAL = Comparison(8, 0, 1.0, 0.0, 0.0, 0, (0, 0), (0, 0))
EVIL = "<script>alert(1)</script>|`x`\x1b[31m"
"""A text that would mean something in HTML, Markdown or a terminal."""


def writer_of(folder: Path, role: str, rank: int = 0, world: int = 1, **fields: Any) -> ReportWriter:
    """The writer of one rank's file, on sides of ``world`` ranks each."""
    config = GrafterConfig(
        enable=True, role=role, b2t_filter="True", master_address="127.0.0.1", master_port=1, baseline_world_size=world,
        target_world_size=world, report_dir=str(folder), **fields,
    )  # fmt: skip
    return ReportWriter(config, rank)


def header(sequence: int, name: str, direction: str = "b2t", **tags: Any) -> Header:
    """Of a tensor of 8 float32."""
    return Header(sequence, direction, name, tags, "float32", (2, 4))


def errors(rel_l2: float, **fields: Any) -> Comparison:
    """A comparison that found this, and these fields."""
    return dataclasses.replace(EQUAL, **{"differing": 3, "rel_l2": rel_l2, **fields})


def write(folder: Path, found: list[tuple[Header, Comparison]], world: int = 1) -> None:
    """The files of a run in which all ranks of the target compared the same."""
    for rank in range(world):
        sends, receives = (writer_of(folder, role, rank, world) for role in ("baseline", "target"))
        for which, comparison in found:
            sends.exchange(which, None, "sent", 32, 0.001)
            receives.exchange(which, comparison, "received", 32, 0.001)
        sends.close()
        receives.close()


def write_model(folder: Path, layers: int = 6, steps: int = 3, world: int = 2, bad_from: int = 3) -> None:
    """Equal in layer 0, near below ``bad_from``, and apart from there on."""
    found = []
    for step in range(steps):
        for layer in range(layers):
            rel_l2 = 0.0 if layer == 0 else 1e-6 * layer if layer < bad_from else 0.01 * (layer + step)
            which = header(len(found), f"layers.{layer}.mlp", layer=layer, step=step)
            found.append((which, errors(rel_l2) if rel_l2 else EQUAL))
    write(folder, found, world)
