"""async_op: calls beside the caller, and the Work that orders the caller behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sgl_comm
from helpers.ranks import Ranks, capturing, ranks_on, synchronize
from sgl_comm.testing import RankContext
from sgl_comm.work import Work

GATE_CYCLES = 200_000_000
"""Of the GPU's clock, about 0.1 s: longer than the host takes to enqueue what stands behind the gate."""


def work_of(ctx: RankContext) -> list[str]:
    """What ``async_op`` gives on the CPU."""
    comm = ctx.comm
    assert comm is not None
    base = torch.zeros(6, 8)
    x = base.t()[1:5, ::2]
    works = [comm.cfg_all_reduce_(x.add_(1), async_op=True), comm.cfg_broadcast_(x, 0, async_op=True)]
    results = [comm.cfg_all_reduce(x, async_op=True), comm.cfg_broadcast(x, 0, async_op=True)]
    wrong = [f"got {type(each).__name__}" for each in (*works, *results) if not isinstance(each, Work)]
    assert all(each.is_completed() for each in (*works, *results))
    assert [each.wait() for each in works] == [None, None]
    assert x.unique().tolist() == [ctx.world]
    assert base.sum() == x.sum(), "what lies between the strides stays"
    assert [each.wait().unique().tolist() for each in results] == [[ctx.world**2], [ctx.world]]
    return wrong


def beside_the_caller(ctx: RankContext) -> list[str]:
    """A call waits for what the caller's stream held, and what follows wait() for the call, without the host."""
    comm, found = ctx.comm, []
    assert comm is not None
    for _ in range(2):  # the first time, kernels are loaded
        base, count = torch.zeros(6, 80, device=ctx.device), torch.zeros((), device=ctx.device)
        x = base.t()[8:48, ::2]
        synchronize(ctx)
        torch.cuda._sleep(GATE_CYCLES)
        work = comm.cfg_all_reduce_(x.add_(1), async_op=True)
        count.add_(1)
        early = work.is_completed()
        assert work.wait() is None
        twice = x * 2
        late = torch.cuda.current_stream().query()
        torch.cuda.synchronize()
        assert work.is_completed()
        found = [early, late, twice.unique().tolist(), float(base.sum() == x.sum()), count.item()]
    expected = [False, False, [2.0 * ctx.world], 1.0, 1.0]
    return [] if found == expected else [f"got {found}, expected {expected}"]


def memory_is_kept(ctx: RankContext) -> list[str]:
    """The caller drops the call's tensor, and later the result, and fills what torch then has free."""
    comm, wrong = ctx.comm, []
    assert comm is not None
    size = (1 << 20,)

    def fill() -> None:
        torch.cuda._sleep(GATE_CYCLES // 10)
        for _ in range(4):
            torch.full(size, 7.0, device=ctx.device)

    for call, expected in (
        (comm.cfg_all_reduce, 2 * ctx.world + 1),
        (lambda x, async_op: comm.cfg_broadcast(x, 0, async_op=async_op), 3),
    ):
        for _ in range(3):
            x = torch.ones(size, device=ctx.device)
            synchronize(ctx)
            torch.cuda._sleep(GATE_CYCLES // 10)
            work = call(x.mul_(2), async_op=True)
            del x
            for _ in range(4):
                torch.full(size, 7.0, device=ctx.device)
            total = work.wait()
            copy = total + 1
            del work, total
            fill()
            other = comm.cfg_all_reduce(copy, async_op=True).wait()
            assert isinstance(other, Tensor)
            found = [copy.unique().tolist(), other.unique().tolist()]
            if found != [[expected], [expected * ctx.world]]:
                wrong.append(f"got {found}, expected {expected} and that {ctx.world} times")
    return wrong


def in_a_graph(ctx: RankContext) -> list[str]:
    """Captured beside other work of the caller, and replayed with other inputs."""
    comm, wrong = ctx.comm, []
    assert comm is not None
    x, y = torch.zeros(3, 5, 7, device=ctx.device).transpose(0, 2), torch.zeros(1000, device=ctx.device)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), capturing(graph):
        works = [comm.cfg_all_reduce_(x, async_op=True), comm.cfg_broadcast(y, ctx.world - 1, async_op=True)]
        beside = y + 1
        assert works[0].wait() is None
        sent = works[1].wait()
        after = x + sent[0]
    for number in range(1, 4):
        x.fill_(number)
        y.fill_(10 * number + ctx.rank)
        synchronize(ctx)
        graph.replay()
        synchronize(ctx)
        last = 10 * number + ctx.world - 1
        expected = [[number * ctx.world], [last], [number * ctx.world + last], [10 * number + ctx.rank + 1]]
        found = [each.unique().tolist() for each in (x, sent, after, beside)]
        wrong += [] if found == expected else [f"replay {number}: got {found}, expected {expected}"]
    return wrong


def of_another_device(ctx: RankContext) -> list[str]:
    """The caller's current device is not the tensor's."""
    comm = ctx.comm
    assert comm is not None
    x = torch.ones(5, 8, device=ctx.device).t()
    synchronize(ctx)
    with torch.cuda.device(0):
        work = comm.cfg_all_reduce_(x, async_op=True)
        assert work.wait() is None
        y = x + 1
        assert torch.cuda.current_device() == 0
    synchronize(ctx)
    return [] if y.unique().tolist() == [ctx.world + 1] else [f"got {y.unique().tolist()}"]


@pytest.mark.parametrize("ranks", ranks_on("cpu", (1, 2, 3)))
def test_on_the_cpu_a_call_has_ended(ranks: Ranks) -> None:
    ranks.all_right(work_of)


def test_async_op_is_refused_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(sgl_comm.SglCommError, match=r"^sgl_comm::cfg_all_reduce_: got async_op=True under torch"):
        sgl_comm.ops.cfg_all_reduce_(torch.ones(3), "any", async_op=True)


@pytest.mark.parametrize("case", [beside_the_caller, memory_is_kept, in_a_graph, of_another_device])
@pytest.mark.parametrize("ranks", ranks_on("cuda", (2, 3)))
def test_on_a_gpu(ranks: Ranks, case: object) -> None:
    ranks.all_right(case)
