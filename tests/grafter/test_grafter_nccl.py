"""NCCL between two systems: it takes no two ranks on one GPU, so one sees the groups made, and two an exchange."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grafter import DTYPES, assert_received

import sgl_comm
from helpers.grafting import grafted, systems
from helpers.values import random_bytes
from sgl_comm.testing import RankContext

SHORT_TIMEOUT_S = 15.0
"""NCCL's first exchange takes seconds."""


pytestmark = pytest.mark.gpu


def test_on_one_gpu_the_groups_are_made_and_cpu_tensors_go_by_gloo(tmp_path: Path) -> None:
    values = {"baseline": [torch.ones(4)], "target": [torch.zeros(4)]}
    calls = [{"values": values, "tags": {"name": "x"}}]
    with systems((1, 1)) as both:
        results = both.run(grafted, str(tmp_path), calls, backend="nccl", b2t_filter="True")
    assert_received(results, calls, [dict.fromkeys(values, values["baseline"])])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two ranks on one GPU, and there is one")
def test_every_dtype_between_two_gpus(tmp_path: Path) -> None:
    calls, expected = [], []
    for direction, sender in (("b2t", "baseline"), ("t2b", "target")):
        for dtype in DTYPES:
            for shape in ((3, 5), (0,), (1000, 1000)):
                name = f"{direction} {dtype} {shape}"
                values = {role: random_bytes(1, shape, dtype, name, role) for role in ("baseline", "target")}
                calls.append({"values": values, "tags": {"name": name}})
                expected.append(dict.fromkeys(values, values[sender]))
    filters = {"b2t_filter": "search('^b2t', name)", "t2b_filter": "search('^t2b', name)"}
    with systems((1, 1), "cuda", envs=[{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]) as both:
        results = both.run(grafted, str(tmp_path), calls, backend="nccl", **filters)
    assert_received(results, calls, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two ranks on one GPU, and there is one")
def test_nccl_ends_at_the_timeout_and_the_process_lives_on(tmp_path: Path) -> None:
    """The baseline says what it sends and does not: the receiver's wait in NCCL ends, and nothing kills its process."""
    values = {"baseline": [torch.ones(4)], "target": [torch.zeros(4)]}
    calls = [{"values": values, "tags": {"name": name}} for name in "xy"]
    with systems((1, 1), "cuda", envs=[{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]) as both:
        _, (target,) = both.run(
            grafted_without_the_second, str(tmp_path), calls, backend="nccl", b2t_filter="True", timeout=SHORT_TIMEOUT_S
        )
        assert target["found"][1].tolist() == [0.0] * 4
        assert target["counts"] == {"received": 1, "faults": 1}
        assert "the exchange with baseline rank 0 failed" in target["off"]
        assert both.pools["target"].run(lives) == [True]


def grafted_without_the_second(
    ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]
) -> Any:
    if fields["role"] == "target":
        return grafted(ctx, fields, report_dir, calls)
    send, sent = sgl_comm.ops.grafter_broadcast_, []

    def once(*args: Any) -> None:
        sent.append(args)
        if len(sent) > 1:
            time.sleep(2 * SHORT_TIMEOUT_S)
        else:
            send(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgl_comm.ops, "grafter_broadcast_", once)
        return grafted(ctx, fields, report_dir, calls)


def lives(ctx: RankContext) -> bool:
    return torch.ones(3, device="cpu").sum().item() == 3
