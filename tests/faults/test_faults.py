"""Ranks that die, never come or leave: the others learn it soon, by name, and can go on afterwards."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.calls import sum_of_ones
from helpers.ranks import capturing
from sgl_comm import SglCommError
from sgl_comm.testing import Dead, RankContext, RankPool

SOON_S = 2.0
"""How soon the others must know of a death."""

AT_ONCE_S = 0.8
"""An answer that waits for nothing, on a busy machine."""

NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error as a rank got it: when (seconds since the epoch), after how long, and its text."""

    at: float
    took: float
    text: str


def refusal(call: Callable[[], object]) -> Refusal:
    """The error of a call that must fail."""
    start = time.monotonic()
    try:
        call()
    except SglCommError as error:
        return Refusal(time.time(), time.monotonic() - start, str(error))
    raise AssertionError("the call gave no error")


def shared_memory_names() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def _nothing_is_left_in_shared_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    before = shared_memory_names()
    yield
    if request.node.get_closest_marker("gpu"):
        return  # the CUDA driver keeps files of its own there while processes use a GPU
    until = time.monotonic() + 2
    while shared_memory_names() - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not shared_memory_names() - before


def works(ctx: RankContext) -> list[float]:
    assert ctx.comm is not None
    return sum_of_ones(ctx.comm.group_name, device=ctx.device)


@dataclasses.dataclass(frozen=True)
class Aftermath:
    """What a survivor saw: the error of the loop, of the next call, and of check()."""

    first: Refusal
    later: Refusal
    checked: Refusal
    usable: bool


def call_until_it_fails(ctx: RankContext, count: int, victim: int, calls: int, time_of_death: str) -> Aftermath | None:
    """Sums in a loop; the victim ends itself after so many calls, if it is to do it itself."""
    assert ctx.comm is not None
    comm = ctx.comm
    x = torch.ones(count, device=ctx.device)

    def loop() -> None:
        for number in range(NEVER):
            if ctx.rank == victim and number == calls:
                Path(time_of_death).write_text(repr(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            comm.all_reduce(x)
            if ctx.device.type == "cuda":
                torch.cuda.synchronize()
                comm.check()

    first = refusal(loop)
    later = refusal(lambda: comm.all_reduce(x))
    checked = refusal(comm.check)
    comm.close()
    return Aftermath(first, later, checked, bool(torch.ones(4, device=ctx.device).sum() == 4))


def assert_the_others_know(results: list[Aftermath | Dead], victim: int, died_at: float, within: float) -> None:
    assert results[victim] == Dead(victim, -signal.SIGKILL)
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        assert isinstance(result, Aftermath)
        assert result.first.at - died_at < within, result
        assert f"rank {victim} died" in result.first.text
        assert f"rank {victim} died" in result.later.text
        assert f"rank {victim} died" in result.checked.text
        assert result.later.took < AT_ONCE_S, result
        assert result.usable


@pytest.mark.parametrize(("world", "victim"), [(2, 0), (2, 1), (3, 0), (3, 2)])
@pytest.mark.parametrize("count", [16, 1 << 20], ids=["small", "large"])
def test_the_others_learn_who_died_between_its_calls(world: int, victim: int, count: int, tmp_path: Path) -> None:
    death = tmp_path / "death"
    with RankPool(world) as pool:
        results = pool.run(call_until_it_fails, count, victim, 20, str(death), deadline=30, allow_dead=True)
    assert_the_others_know(results, victim, float(death.read_text()), SOON_S)


@pytest.mark.parametrize("count", [16, 1 << 20], ids=["small", "large"])
def test_the_others_learn_who_died_inside_a_call(count: int) -> None:
    victim, died_at = 1, []
    with RankPool(3) as pool:

        def kill() -> None:
            died_at.append(time.time())
            os.kill(pool.processes[victim], signal.SIGKILL)

        timer = threading.Timer(0.4, kill)
        timer.start()
        try:
            results = pool.run(call_until_it_fails, count, victim, NEVER, "", deadline=30, allow_dead=True)
        finally:
            timer.join()
    assert_the_others_know(results, victim, died_at[0], SOON_S)
    with RankPool(3) as pool:
        assert pool.run(works, deadline=30) == [[3.0]] * 3


def call_late(ctx: RankContext, victim: int) -> Refusal | None:
    """The victim ends at once; the others call when it is long dead."""
    assert ctx.comm is not None
    if ctx.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return refusal(lambda: sum_of_ones(ctx.comm.group_name, device=ctx.device))


def test_a_call_after_a_death_fails_at_once() -> None:
    with RankPool(2) as pool:
        results = pool.run(call_late, 1, deadline=30, allow_dead=True)
    assert "rank 1 died" in results[0].text
    assert results[0].took < AT_ONCE_S


@dataclasses.dataclass(frozen=True)
class LateRank:
    """What a rank saw of a call to which rank 1 came late, and what worked afterwards."""

    first: Refusal
    later: Refusal
    on_old_group: list[float]
    on_new_group: list[float]


def wait_in_vain(ctx: RankContext, count: int) -> LateRank:
    assert ctx.comm is not None
    comm = ctx.comm
    x = torch.ones(count)
    if ctx.rank == 1:
        time.sleep(2.0)
    first = refusal(lambda: comm.all_reduce(x))
    later = refusal(lambda: comm.all_reduce_(x))
    comm.close()
    dist.barrier(ctx.group)
    with sgl_comm.init(ctx.group) as again:
        on_old_group = sum_of_ones(again.group_name, device=ctx.device)
    group = dist.new_group(list(range(ctx.world)))
    with sgl_comm.init(group) as other:
        on_new_group = sum_of_ones(other.group_name, device=ctx.device)
    return LateRank(first, later, on_old_group, on_new_group)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [16, 1 << 20], ids=["small", "large"])
def test_a_rank_that_never_calls_is_named_when_the_time_is_up(world: int, count: int) -> None:
    with RankPool(world, env={"SGLCOMM_TIMEOUT": "1"}) as pool:
        results: list[LateRank] = pool.run(wait_in_vain, count, deadline=30)
    for rank, result in enumerate(results):
        assert "SGLCOMM_TIMEOUT" in result.first.text
        assert "for rank 1, which never came" in result.first.text
        reasons = {refused.text.partition(": rank ")[2].partition(": ")[2] for refused in (result.first, result.later)}
        assert len(reasons) == 1, result
        if rank == 1:
            assert result.first.took < AT_ONCE_S, "the late rank's own call must not wait"
        else:
            assert 0.9 < result.first.took < 1.9, result
        assert result.later.took < AT_ONCE_S
        assert result.on_old_group == [world]
        assert result.on_new_group == [world]


def call_after_rank_1_closed(ctx: RankContext) -> Refusal | None:
    assert ctx.comm is not None
    x = torch.ones(5)
    ctx.comm.all_reduce(x)
    if ctx.rank == 1:
        time.sleep(0.3)  # some are inside the call by now
        ctx.comm.close()
        return None
    return refusal(lambda: ctx.comm.all_reduce(x))


def test_a_rank_that_closed_its_communicator_is_named_at_once() -> None:
    with RankPool(3) as pool:
        results = pool.run(call_after_rank_1_closed, deadline=30)
    for rank in (0, 2):
        assert "rank 1 has closed its communicator" in results[rank].text
        assert results[rank].took < 0.3 + AT_ONCE_S


GPU_TIMEOUT_S = 3
"""SGLCOMM_TIMEOUT of the GPU tests."""


@dataclasses.dataclass(frozen=True)
class Abandoned:
    """What a GPU rank saw of a call to which another rank did not come, and what worked afterwards."""

    took: float
    checked: Refusal
    nan: list[bool]
    context_usable: bool
    later: Refusal
    replayed_nan: bool
    on_new_communicator: list[float]


def _all_nan(x: Tensor) -> bool:
    return x.numel() > 0 and bool(x.isnan().all())


def wait_in_vain_on_gpu(ctx: RankContext, how: str, op: str, count: int, absent: int) -> Abandoned | None:
    """All ranks but one call, or replay a graph of calls, and wait for the result."""
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group, ctx.device)
    x = torch.ones(count, device=ctx.device, dtype=torch.bfloat16)
    outs: list[Tensor] = []

    def calls() -> None:
        if op == "norm":
            norm = sgl_comm.ops.tp_attn_all_reduce_and_layernorm
            rows = x.view(-1, min(count, 16384))
            weight = torch.full_like(rows[0], ctx.world)
            outs[:] = norm(rows, torch.zeros_like(rows), weight, None, 0.0, group_name=comm.group_name)
            return
        outs[:] = [comm.all_reduce(x), x.clone()]
        comm.all_reduce_(outs[1])

    graph = torch.cuda.CUDAGraph() if how == "graph" else None
    calls()
    if graph is not None:
        with capturing(graph):
            calls()
        graph.replay()
    torch.cuda.synchronize()
    comm.check()
    assert all(out.unique().tolist() == [ctx.world] for out in outs)
    dist.barrier(ctx.group)

    result = None
    if ctx.rank != absent:
        start = time.monotonic()
        graph.replay() if graph is not None else calls()
        torch.cuda.synchronize()
        took = time.monotonic() - start
        checked = refusal(comm.check)
        nan = [_all_nan(out) for out in outs]
        usable = torch.ones(4, device=ctx.device).sum().item() == 4
        later = refusal(lambda: comm.all_reduce(x))
        replayed_nan = True
        if graph is not None:
            for out in outs:
                out.zero_()
            graph.replay()
            replayed_nan = all(_all_nan(out) for out in outs)
        result = Abandoned(took, checked, nan, usable, later, replayed_nan, [])
    dist.barrier(ctx.group)
    del graph
    start = time.monotonic()
    comm.close()
    assert time.monotonic() - start < 5, "close() took too long"
    dist.barrier(ctx.group)
    with sgl_comm.init(group, ctx.device) as again:
        on_new_communicator = sum_of_ones(again.group_name, device=ctx.device)
    dist.destroy_process_group(group)
    return dataclasses.replace(result, on_new_communicator=on_new_communicator) if result is not None else None


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[Callable[[int], RankPool]]:
    """Pools of GPU ranks with a short timeout, by world; made when first asked for, or after a failure."""
    pools: dict[int, RankPool] = {}

    def pool_of(world: int) -> RankPool:
        if world not in pools or not pools[world].usable:
            env = {"SGLCOMM_TIMEOUT": str(GPU_TIMEOUT_S)}
            pools[world] = RankPool(world, "cuda", env=env, make_comm=False)
        return pools[world]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("op", "count"),
    [("sum", 1000), ("sum", 4 << 20), ("norm", 1000), ("norm", 1 << 20)],
    ids=["one_shot", "ring", "norm of a row a block", "norm of many rows"],
)
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_gpu_rank_that_never_calls_is_named_when_the_time_is_up(
    gpu_pool: Callable[[int], RankPool], how: str, op: str, count: int, world: int
) -> None:
    absent = 1
    results = gpu_pool(world).run(wait_in_vain_on_gpu, how, op, count, absent, deadline=60)
    for rank, result in enumerate(results):
        if rank == absent:
            continue
        assert GPU_TIMEOUT_S - 0.5 < result.took < 6, result
        assert "SGLCOMM_TIMEOUT" in result.checked.text
        assert f"for rank {absent}, which never came" in result.checked.text
        assert result.nan == [True, True]
        assert result.context_usable
        assert f"rank {absent}" in result.later.text
        assert result.later.took < AT_ONCE_S
        assert result.replayed_nan, "a replay after the failure must give NaN"
        assert result.on_new_communicator == [world]


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1000, 4 << 20], ids=["one_shot", "ring"])
def test_the_others_learn_which_gpu_rank_died(world: int, count: int, tmp_path: Path) -> None:
    death = tmp_path / "death"
    with RankPool(world, "cuda") as pool:
        results = pool.run(call_until_it_fails, count, 1, 20, str(death), deadline=60, allow_dead=True)
    assert_the_others_know(results, 1, float(death.read_text()), SOON_S + 1)


def close_while_idle(ctx: RankContext) -> Refusal | list[float]:
    """Rank 1 closes its communicator and lives on; rank 0 calls."""
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group, ctx.device)
    dist.barrier(ctx.group)
    if ctx.rank == 1:
        comm.close()
    dist.barrier(ctx.group)

    def call() -> None:
        comm.all_reduce(torch.ones(5, device=ctx.device))
        torch.cuda.synchronize()
        comm.check()

    seen = refusal(call)
    comm.close()
    dist.barrier(ctx.group)
    with sgl_comm.init(group, ctx.device) as again:
        assert sum_of_ones(again.group_name, device=ctx.device) == [ctx.world]
    return seen


@pytest.mark.gpu
def test_a_gpu_rank_that_closed_its_communicator_is_named_in_time(gpu_pool: Callable[[int], RankPool]) -> None:
    waited, closed = gpu_pool(2).run(close_while_idle, deadline=60)
    assert "rank 1" in waited.text
    assert waited.took < 6
    assert "is closed" in closed.text
