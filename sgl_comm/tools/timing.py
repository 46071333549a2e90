"""How calls are timed: samples of many calls, all ranks together, the slowest rank counts.

Repeated in-place sums grow by a factor of up to ``world`` a call. The timed values start tiny, the work goes round
several buffers, and every sample starts from fresh ones, so that all values stay finite and none is zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from sgl_comm.tools.contenders import Contender

MAX_CALLS = 200
"""The most calls in one sample on the CPU."""

MIN_SAMPLES = 10
"""A slow size gets fewer samples than asked for, but this many."""

_SAMPLE_S = 2e-3
_WARM_UP_CALLS = 3
_MIN_BUFFERS_GPU = 4
_SMALL_BYTES = 1 << 20
_START_EXPONENT = {torch.float32: -100, torch.bfloat16: -100, torch.float16: -13}
_MAX_EXPONENT = {torch.float32: 127, torch.bfloat16: 127, torch.float16: 15}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call, over samples of which each is the slowest rank's mean over ``calls`` calls."""

    median_us: float
    p99_us: float
    samples: int
    calls: int


def timed_values(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random values of both signs, tiny enough for :func:`calls_until_overflow` sums in place."""
    magnitude = torch.rand(numel, device=device) + 1
    sign = torch.randint(0, 2, (numel,), device=device) * 2 - 1
    return (magnitude * sign * 2.0 ** _START_EXPONENT[dtype]).to(dtype)


def calls_until_overflow(dtype: torch.dtype, world: int) -> int:
    """How often :func:`timed_values` can be summed in place over ``world`` ranks and stay finite."""
    doublings = _MAX_EXPONENT[dtype] - (_START_EXPONENT[dtype] + 1)
    return max(1, int(doublings / math.log2(world))) if world > 1 else MAX_CALLS


def time_calls(
    contenders: Sequence[Contender],
    x: torch.Tensor,
    group: dist.ProcessGroup,
    samples: int,
    budget_s: float,
    capture: Callable[[], AbstractContextManager[object]] | None,
    calls: int | None = None,
) -> list[Timing]:
    """``time_graphs``, or ``time_eager`` where there is no ``capture``."""
    if capture is None:
        return time_eager(contenders, x, group, samples, budget_s)
    return time_graphs(contenders, x, group, samples, capture, calls)


def time_eager(
    contenders: Sequence[Contender], x: torch.Tensor, group: dist.ProcessGroup, samples: int, budget_s: float
) -> list[Timing]:
    """Times calls made from Python, the contenders taking turns.

    A sample is: fresh values, a barrier, a few calls to fall into step, then ``calls`` timed calls.

    Args:
        x: this rank's values, from :func:`timed_values`.
        group: the ranks; must accept CPU tensors.
        samples: how many; fewer (at least ``MIN_SAMPLES``) if they would take longer than ``budget_s`` seconds.
    """
    synchronize = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    limit = calls_until_overflow(x.dtype, group.size())
    plans: list[tuple[int, int, int]] = []
    for contender in contenders:
        cost = _estimate(contender, x, group, synchronize)
        calls = max(1, min(MAX_CALLS, int(_SAMPLE_S / cost)))
        lead = max(1, calls // 10)
        count = max(min(samples, MIN_SAMPLES), min(samples, int(budget_s / (cost * (calls + lead)))))
        contender.setup(x, math.ceil((calls + lead) / limit))
        plans.append((count, lead, calls))

    def sample(contender: Contender, lead: int, calls: int) -> float:
        _refill(contender, x)
        _barrier(group)
        for _ in range(lead):
            contender.run()
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            contender.run()
        synchronize()
        return (time.perf_counter() - start) / calls * 1e6

    times: list[list[float]] = [[] for _ in contenders]
    for index in range(max(count for count, _, _ in plans)):
        for contender, (count, lead, calls), mine in zip(contenders, plans, times, strict=True):
            if index < count:
                mine.append(sample(contender, lead, calls))
    return [_timing(mine, calls, group) for mine, (_, _, calls) in zip(times, plans, strict=True)]


def time_graphs(
    contenders: Sequence[Contender],
    x: torch.Tensor,
    group: dist.ProcessGroup,
    samples: int,
    capture: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    calls: int | None = None,
) -> list[Timing]:
    """Times CUDA graphs of many calls on rotating buffers, the contenders taking turns.

    A sample is: fresh values, a barrier of the hosts, one replay to fall into step, then one replay between two
    events, with nothing in between that waits for the host.

    Args:
        x: this rank's values on its GPU, from :func:`timed_values`.
        group: the ranks; must accept CPU tensors.
        samples: how many.
        capture: a context in which ``Communicator`` allows capturing.
        calls: how many a graph has; None for 20, or 100 of small tensors.
    """
    if calls is None:
        calls = 100 if x.numel() * x.element_size() <= _SMALL_BYTES else 20
    num_buffers = max(_MIN_BUFFERS_GPU, math.ceil(2 * calls / calls_until_overflow(x.dtype, group.size())))
    graphs = []
    for contender in contenders:
        contender.setup(x, num_buffers)
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                contender.run()
        torch.cuda.synchronize(x.device)
        _barrier(group)
        graph = torch.cuda.CUDAGraph()
        with capture(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                contender.run()
        graphs.append(graph)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(contender: Contender, graph: torch.cuda.CUDAGraph) -> float:
        _refill(contender, x)
        torch.cuda.synchronize(x.device)
        _barrier(group)
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(x.device)
        return begin.elapsed_time(end) / calls * 1e3

    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(samples):
        for contender, graph, mine in zip(contenders, graphs, times, strict=True):
            mine.append(sample(contender, graph))
    return [_timing(mine, calls, group) for mine in times]


def _estimate(
    contender: Contender, x: torch.Tensor, group: dist.ProcessGroup, synchronize: Callable[[], None]
) -> float:
    """Seconds a call, roughly; every rank gets the same number."""
    contender.setup(x, 1)
    contender.run()
    synchronize()
    _barrier(group)
    start = time.perf_counter()
    for _ in range(_WARM_UP_CALLS):
        contender.run()
    synchronize()
    cost = torch.tensor((time.perf_counter() - start) / _WARM_UP_CALLS, dtype=torch.float64)
    dist.all_reduce(cost, dist.ReduceOp.MIN, group=group)
    return max(cost.item(), 1e-7)


def _refill(contender: Contender, x: torch.Tensor) -> None:
    for buffer in contender.buffers:
        buffer.copy_(x)


def _barrier(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.zeros(1), group=group)  # on the CPU: what dist.barrier waits for depends on the backend


def _timing(times: list[float], calls: int, group: dist.ProcessGroup) -> Timing:
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    ordered = sorted(slowest.tolist())
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Timing(median, p99, len(ordered), calls)
