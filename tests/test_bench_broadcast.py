"""``benchmarks/bench_broadcast.py``: its table, its JSON, and what it counts as wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_broadcast

import sgl_comm
from sgl_comm.testing import RankContext, run_ranks


def test_the_table_and_the_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--device", "cpu", "--sizes", "1K", "64K", "--iters", "2", "--json", str(file)]
    environ = os.environ | {"PYTHONPATH": str(Path(sgl_comm.__file__).parents[1])}
    command = [sys.executable, bench_broadcast.__file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    heads, *rows = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert heads.split() == ["from", "bytes", "cfg_broadcast_", "gloo", "#wrong"]
    figures = json.loads(file.read_text())["rows"]
    assert len(rows) == len(figures) == 2 * len(bench_broadcast.SOURCES)
    for times in figures.values():
        assert times["#wrong"] == 0
        assert times["cfg_broadcast_"] > 0
        assert times["gloo"] > 0


def wrong_counts(ctx: RankContext) -> list[int]:
    """Of both, and of a call that is left out, from rank 0 and by turns."""
    assert ctx.comm is not None
    counts = []
    for sources_of in bench_broadcast.SOURCES.values():
        sources = sources_of(ctx.world)
        everyone = bench_broadcast.contenders(sources, ctx.comm.group_name, ("gloo", ctx.group))
        everyone.append(bench_broadcast.Broadcast("", sources, lambda x, src: None))
        counts += [bench_broadcast.count_wrong(ctx, each, 100) for each in everyone]
    return counts


def test_what_is_wrong_is_counted_over_all_ranks_and_sources() -> None:
    assert run_ranks(wrong_counts, 2) == [[0, 0, 100, 0, 0, 200]] * 2
