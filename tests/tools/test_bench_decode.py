"""``benchmarks/bench_decode.py``: its table, its JSON, and what it counts as wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import bench_decode
import pytest
import torch

from helpers.programs import run_python
from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.models import ModelConfig, Step3p5, Unsharded
from sgl_comm.testing import RankContext, run_ranks

SMALL = ["--layers", "2", "--context", "12", "--iters", "3", "--set", "hidden_size=64", "heads=4", "head_size=8"]


def run_script(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return run_python(*launcher, bench_decode.__file__, "--device", "cpu", *SMALL, *args)


def test_the_table_and_the_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_script("--batch", "1", "3", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]
    names = [["sgl_comm", "fused"], ["sgl_comm", "separate"], ["gloo"]]
    assert [row[:-5] for row in rows] == [[batch, *name] for batch in "13" for name in names]
    assert all(row[-1] == "0" for row in rows)
    assert done.stdout.splitlines()[-1] == "# wrong logits: 0 OK"

    figures = json.loads(file.read_text())
    environment = figures["environment"]
    assert (environment["world"], environment["backend"], environment["layers"]) == (2, "shm", "DM")
    for row, shown in zip(figures["rows"], rows, strict=True):
        assert [str(row["batch"]), *row["name"].split()] == shown[:-5]
        assert 0 < row["step_us"] <= row["p99_us"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_us"] * 1e6, rel=0.01)
        assert (row["samples"], row["wrong"]) == (3, 0)


def test_llama_compiled_under_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script("--model", "llama", "--dtype", "bfloat16", "--compile", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if not line.startswith("#")]) == 3, "one rank prints"
    assert "# layers: DD\n" in done.stdout
    assert "# compiled: True\n" in done.stdout


def wrong_counts(ctx: RankContext, dtype: torch.dtype) -> list[int]:
    """Of the fused model, and of one that never reduces."""
    config = ModelConfig("DM", dtype=dtype)
    with LayerGroups(ParallelConfig(ctx.world), ctx.group, ctx.device) as groups:
        right = Step3p5(config, groups)
        wrong = Step3p5(config, groups, all_reduce=lambda x, _: x, weights_of=right)
        everyone = [bench_decode.Decode("", model, 2, 8) for model in (right, wrong)]
        return bench_decode.count_wrong(ctx, everyone, *bench_decode.expected_of(Unsharded(config), 2, 8), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_logits_are_counted(dtype: torch.dtype) -> None:
    for right, wrong in run_ranks(wrong_counts, 2, dtype):
        assert right == 0
        assert wrong > 100


@pytest.mark.parametrize("text", ["hidden_size", "hidden_size=x", "eps=1", "other=2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(bench_decode.argparse.ArgumentTypeError, match="expected NAME=NUMBER with one of vocab_size"):
        bench_decode.parse_size(text)
