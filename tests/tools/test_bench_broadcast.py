"""``benchmarks/bench_broadcast.py``: its table, its JSON, and what it counts as wrong."""

from __future__ import annotations

from pathlib import Path

import bench_broadcast

from helpers.programs import run_benchmark
from sgl_comm.testing import RankContext, run_ranks


def test_the_table_and_the_json(tmp_path: Path) -> None:
    heads, rows, figures = run_benchmark(bench_broadcast, tmp_path, "--sizes", "1K", "64K")
    assert heads.split() == ["from", "bytes", "cfg_broadcast_", "gloo", "#wrong"]
    assert len(rows) == len(figures["rows"]) == 2 * len(bench_broadcast.SOURCES)
    for times in figures["rows"].values():
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
