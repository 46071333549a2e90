"""The protocol that engines know of an all-reduce class: should_custom_ar, custom_all_reduce, capture, close."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.errors import error_text
from helpers.fake_gpu import NO_ACCESS, NO_NVLINK, SURVEYS, fake_gpu, on_gpu
from helpers.ranks import capturing, synchronize
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.gpu_all_reduce import GpuAllReduce
from sgl_comm.backends.shm_all_reduce import ShmAllReduce
from sgl_comm.testing import RankContext, run_ranks

CLASSES = {"v1": CustomAllReduceV1, "v2": CustomAllReduceV2, "shm": ShmAllReduce}


def by_its_class(ctx: RankContext, kind: str) -> list[str]:
    """disabled, should_custom_ar, custom_all_reduce, capture and close, as an engine calls them."""
    device = torch.device("cpu") if kind == "shm" else ctx.device
    group = dist.new_group(list(range(ctx.world)))
    part = CLASSES[kind](group, device, max_size=1 << 20)
    floats, ints = torch.ones(3000, device=device), torch.ones(3, dtype=torch.int32, device=device)
    elsewhere = torch.ones(3) if kind != "shm" else on_gpu(torch.float32, 12)
    total = float(ctx.world)
    seen = {
        "enabled": not part.disabled and part.reason == "" and part.fault() == "",
        "floats": part.should_custom_ar(floats) and part.should_custom_ar(floats.half()),
        "ints": not part.should_custom_ar(ints) and part.custom_all_reduce(ints) is None,
        "elsewhere": not part.should_custom_ar(elsewhere) and part.custom_all_reduce(elsewhere) is None,
    }

    def is_sum(out: Tensor | None) -> bool:
        return out is not None and out.unique().tolist() == [total]

    seen["eager"] = is_sum(part.custom_all_reduce(floats))
    with part.capture():
        seen["warm-up"] = is_sum(part.custom_all_reduce(floats))
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with capturing(graph):
                out = part.custom_all_reduce(floats)
        seen["after the capture"] = is_sum(part.custom_all_reduce(floats))
    if device.type == "cuda":
        for turn in (2.0, 5.0):
            floats.fill_(turn)
            synchronize(ctx)
            graph.replay()
            synchronize(ctx)
            seen[f"replay with {turn}"] = out is not None and out.unique().tolist() == [turn * total]
        floats.fill_(1.0)
        del graph
    seen["no error was raised"] = error_text(lambda: raise_in_capture(part, ctx.rank == 1)) == (
        "" if ctx.rank == 1 else "capture: rank 1: KeyError: 'planted'"
    )
    seen["fault"] = part.fault() == ""
    synchronize(ctx)
    part.close()
    part.close()
    closed = error_text(lambda: part.custom_all_reduce(floats))
    seen["closed"] = "is closed; init() it again" in closed or "unknown group" in closed
    again = CLASSES[kind](group, device)
    seen["again"] = is_sum(again.custom_all_reduce(floats))
    synchronize(ctx)
    again.close()
    dist.destroy_process_group(group)
    return [name for name, right in seen.items() if not right]


def raise_in_capture(part: GpuAllReduce | ShmAllReduce, fails: bool) -> None:
    """Raises what a rank gets from another's error; the failing one's own must come out as it is."""
    try:
        with part.capture():
            if fails:
                raise KeyError("planted")
    except KeyError:
        assert fails


@pytest.mark.parametrize("world", [2, 3])
def test_shm_has_the_protocol(world: int) -> None:
    assert run_ranks(by_its_class, world, "shm", deadline=30) == [[]] * world


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_classes_of_gpus_have_the_protocol(kind: str, world: int) -> None:
    assert run_ranks(by_its_class, world, kind, device="cuda") == [[]] * world


def disabled_by_its_class(ctx: RankContext, kind: str) -> list[str]:
    """Where it cannot serve, an engine asks and gets "no"; nothing raises."""
    group = dist.new_group(list(range(ctx.world)))
    with fake_gpu(SURVEYS["gloo, two reasons"]):
        part = CLASSES[kind](group, "cuda:0")
    floats = on_gpu(torch.float32, 12)
    with part.capture():
        served = part.custom_all_reduce(floats)
    seen = {
        "disabled": part.disabled,
        "reason": part.reason == (NO_NVLINK if kind == "v2" else NO_ACCESS),
        "floats": not part.should_custom_ar(floats) and served is None,
        "fault": part.fault() == "",
    }
    part.close()
    part.close()
    dist.destroy_process_group(group)
    return [name for name, right in seen.items() if not right]


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_class_that_cannot_serve_says_no(kind: str) -> None:
    assert run_ranks(disabled_by_its_class, 2, kind) == [[], []]
