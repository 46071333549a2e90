"""``benchmarks/bench_all_reduce_layernorm.py`` between real ranks: its table, its JSON, and what it counts as wrong."""

from __future__ import annotations

from pathlib import Path

import bench_all_reduce_layernorm as bench_norm
import torch

from helpers.programs import run_benchmark
from sgl_comm.testing import RankContext, run_ranks


def test_the_table_and_the_json(tmp_path: Path) -> None:
    heads, rows, figures = run_benchmark(bench_norm, tmp_path, "--hidden", "64", "--tokens", "1", "3")
    names = ["fused", "unfused", "gloo and norm", "#wrong"]
    assert all(name in heads for name in names)
    assert [row.split()[:3] for row in rows] == [["2", "64", "1"], ["2", "64", "3"]]
    assert figures["environment"]["backend"] == "shm"
    assert list(figures["rows"]) == ["1 x 64", "3 x 64"]
    for times in figures["rows"].values():
        assert list(times) == names
        assert times["#wrong"] == 0
        assert all(times[name] > 0 for name in names[:-1])


def wrong_counts(ctx: RankContext) -> list[int]:
    """Of a norm that is right, one of this rank's input alone, and that one where only nearness is asked."""
    assert ctx.comm is not None
    name = ctx.comm.group_name
    norm, residual, weight = bench_norm.norm_of(4, 64, ctx.device, torch.float32)
    calls = [(lambda x: norm(x, name), True), (lambda x: x.clone(), True), (lambda x: x.clone(), False)]
    return [bench_norm.count_wrong(ctx, bench_norm.Summed("", *call), residual, weight) for call in calls]


def test_what_is_wrong_is_counted_over_all_ranks() -> None:
    for right, exactly, nearly in run_ranks(wrong_counts, 2):
        assert right == 0
        assert exactly == 2 * 4 * 64
        assert 0 < nearly <= 2 * 4 * 64
