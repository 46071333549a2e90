"""``benchmarks/bench_cfg_all_reduce.py``: its table, its JSON, and what it counts as wrong."""

from __future__ import annotations

from pathlib import Path

import bench_cfg_all_reduce as bench_cfg
import torch

from helpers.programs import run_benchmark
from sgl_comm.testing import RankContext, run_ranks


def test_the_table_and_the_json(tmp_path: Path) -> None:
    heads, rows, figures = run_benchmark(bench_cfg, tmp_path, "--sizes", "1K", "64K")
    assert heads.split() == ["layout", "bytes", "cfg_all_reduce_", "by", "hand", "#wrong", "ratio"]
    assert len(rows) == len(figures["rows"]) == 2 * len(bench_cfg.LAYOUTS)
    for times in figures["rows"].values():
        assert times["#wrong"] == 0
        assert times["cfg_all_reduce_"] > 0
        assert times["by hand"] > 0


def wrong_counts(ctx: RankContext) -> list[int]:
    """Of the op, and of a sum that is left out."""
    assert ctx.comm is not None
    lay_out = bench_cfg.LAYOUTS["transposed"]
    right, by_hand = bench_cfg.contenders(lay_out, ctx.comm.group_name)
    left_out = bench_cfg.Strided("", lay_out, lambda x: None)
    return [bench_cfg.count_wrong(ctx, each, (1, 16, 3, 5), torch.float32) for each in (right, by_hand, left_out)]


def test_what_is_wrong_is_counted_over_all_ranks() -> None:
    assert run_ranks(wrong_counts, 2) == [[0, 0, 2 * 16 * 3 * 5]] * 2


def test_layouts_are_none_that_torch_would_call_contiguous() -> None:
    x = torch.arange(16.0 * 6).view(1, 16, 2, 3)
    for lay_out in bench_cfg.LAYOUTS.values():
        assert torch.equal(lay_out(x), x)
        assert not lay_out(x).is_contiguous()
