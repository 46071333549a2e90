"""Several streams and one communicator: calls keep their order; what breaks the contract is detected and ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import Compared, assert_none_wrong, differences
from helpers.errors import error_text
from helpers.ranks import Pools, capturing, simulating_pools, synchronize
from helpers.rows import V2_OPS, Rows, call, compared, input_count, result_count
from sgl_comm.testing import RankContext, SimulatedRank, capture_simulated, make_simulated

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
NUM_CALLS = 200
GATE_CYCLES = 50_000_000
"""Of the GPU's clock: longer than the host takes to enqueue what stands behind the gate."""
TIMEOUT_S = 3
"""SGLCOMM_TIMEOUT where a rank is missed on purpose."""

KINDS = {"v1": ("v1",), "v2": V2_OPS}


@pytest.fixture(scope="module")
def one_process() -> Iterator[Pools]:
    pools = simulating_pools()
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def short_one_process() -> Iterator[Pools]:
    pools = Pools({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "SGLCOMM_TIMEOUT": str(TIMEOUT_S)})
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Pools]:
    pools = Pools({"SGLCOMM_TIMEOUT": str(TIMEOUT_S)})
    yield pools
    pools.close()


@dataclass(frozen=True)
class Sent:
    """A call of the chain: its name and which window of each rank's row goes in."""

    op: str
    start: int
    count: int


def chain(kind: str, world: int, length: int) -> list[Sent]:
    """Large and small messages by turns, so that a call that does not wait for the one before overtakes it; each op is
    called with both."""
    ops = KINDS[kind]
    sent = []
    for number in range(length):
        turn, which = divmod(number, len(ops))
        op = ops[which]
        sent.append(Sent(op, 16 * number, input_count(op, 40_000 if (turn + which) % 2 == 0 else 24, world)))
    return sent


def wrong_results(rows: Rows, sent: Sequence[Sent], outs: Sequence[Tensor], rank: int, label: str) -> list[str]:
    return differences(
        compared(each.op, f"{label}, call {number}, {each}", out, rows.expected(each.op, rank, each.start, each.count))
        for number, (each, out) in enumerate(zip(sent, outs, strict=True))
    )


# --- eager calls


def alternating_simulated(ctx: RankContext, world: int, kind: str) -> list[str]:
    """Each rank's calls on two streams by turns; nothing but the communicator orders them."""
    sent = chain(kind, world, NUM_CALLS)
    rows = Rows(world, BF16, ctx.device, 40_000)
    with make_simulated(world, device=ctx.device.index or 0) as ranks:
        streams = [(rank.stream, torch.cuda.Stream()) for rank in ranks]
        for pair in streams:
            for stream in pair:
                hold_memory(stream, sent, world, ctx.device)
        torch.cuda.synchronize()
        outs: list[list[Tensor]] = [[] for _ in ranks]
        for number, each in enumerate(sent):
            for rank, pair in zip(ranks, streams, strict=True):
                x = rows.window(rank.rank, each.start, each.count)
                with torch.cuda.stream(pair[number % 2]):
                    outs[rank.rank].append(call(each.op, x, rank.group_name))
        torch.cuda.synchronize()
        wrong = [
            text for rank in ranks for text in wrong_results(rows, sent, outs[rank.rank], rank.rank, str(rank.rank))
        ]
        return wrong + [rank.fault() for rank in ranks if rank.fault()]


def hold_memory(stream: torch.cuda.Stream, sent: Sequence[Sent], world: int, device: torch.device) -> None:
    """Lets torch hold enough memory for the results, since none should be asked for while kernels wait."""
    with torch.cuda.stream(stream):
        held = [torch.empty(result_count(each.op, each.count, world), dtype=BF16, device=device) for each in sent]
        held.clear()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_eager_calls_on_two_streams_keep_their_order(one_process: Pools, kind: str, world: int) -> None:
    assert_none_wrong(one_process.of(1).run(alternating_simulated, world, kind, deadline=60))


def alternating(ctx: RankContext, kind: str) -> list[str]:
    """The same between two processes; then each call sums what the one before it, on the other stream, gave."""
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group, ctx.device)
    sent = chain(kind, ctx.world, NUM_CALLS)
    rows = Rows(ctx.world, BF16, ctx.device, 40_000)
    streams = (torch.cuda.Stream(), torch.cuda.Stream())
    ones = torch.ones(5000, device=ctx.device)
    synchronize(ctx)
    outs = []
    for number, each in enumerate(sent):
        x = rows.window(ctx.rank, each.start, each.count)
        with torch.cuda.stream(streams[number % 2]):
            outs.append(call(each.op, x, comm.group_name))
    doubled = [ones]
    for number in range(60):
        with torch.cuda.stream(streams[number % 2]):
            doubled.append(call(KINDS[kind][0], doubled[-1], comm.group_name))
    synchronize(ctx)
    wrong = wrong_results(rows, sent, outs, ctx.rank, "eager")
    powers = [Compared(f"summed {n} times", x, torch.full_like(x, 2.0**n)) for n, x in enumerate(doubled)]
    wrong += differences(powers)
    comm.check()
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_eager_calls_of_processes_on_two_streams_keep_their_order(processes: Pools, kind: str) -> None:
    assert_none_wrong(processes.of(2).run(alternating, kind, deadline=60))


# --- a capture that forks


FORKED = (40_000, 24, 20_000, 8, 1001)
"""Elements of a forked capture's calls: the first, third and last on one stream, the others on a second one."""


def forked_calls(kind: str, world: int, turn: int) -> list[Sent]:
    ops = KINDS[kind]
    return [
        Sent(ops[number % len(ops)], 16 * (number + 7 * turn), input_count(ops[number % len(ops)], count, world))
        for number, count in enumerate(FORKED)
    ]


def issue_forked(
    sent: Sequence[Sent], inputs: Sequence[Tensor], group_name: str, main: torch.cuda.Stream, side: torch.cuda.Stream
) -> list[Tensor]:
    """Between the fork and the join nothing but the communicator orders the calls."""
    outs = []
    for number, (each, x) in enumerate(zip(sent, inputs, strict=True)):
        if number == 1:
            side.wait_stream(main)
        if number == len(sent) - 1:
            main.wait_stream(side)
        with torch.cuda.stream(side if number % 2 == 1 else main):
            outs.append(call(each.op, x, group_name))
    return outs


def forked_simulated(ctx: RankContext, world: int, kind: str) -> list[str]:
    device = ctx.device
    rows = Rows(world, BF16, device, 40_000)
    sent = forked_calls(kind, world, 0)
    graphs, outs, wrong = [], [], []
    with make_simulated(world, device=device.index or 0) as ranks:
        inputs = [[torch.zeros(each.count, dtype=BF16, device=device) for each in sent] for _ in ranks]
        with capture_simulated(ranks):
            for rank in ranks:
                graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
                with capturing(graph, stream=rank.stream):
                    outs.append(issue_forked(sent, inputs[rank.rank], rank.group_name, rank.stream, side))
                graphs.append(graph)
        for turn in range(3):
            sent = forked_calls(kind, world, turn)
            for rank in ranks:
                for each, x in zip(sent, inputs[rank.rank], strict=True):
                    x.copy_(rows.window(rank.rank, each.start, each.count))
            torch.cuda.synchronize()
            for rank, graph in zip(ranks, graphs, strict=True):
                with torch.cuda.stream(rank.stream):
                    graph.replay()
            torch.cuda.synchronize()
            for rank in ranks:
                wrong += wrong_results(rows, sent, outs[rank.rank], rank.rank, f"rank {rank.rank}, replay {turn}")
        wrong += [rank.fault() for rank in ranks if rank.fault()]
    return wrong


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_that_forks_and_joins(one_process: Pools, kind: str, world: int) -> None:
    assert_none_wrong(one_process.of(1).run(forked_simulated, world, kind, deadline=60))


def forked(ctx: RankContext, kind: str) -> list[str]:
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group, ctx.device)
    rows = Rows(ctx.world, BF16, ctx.device, 40_000)
    sent = forked_calls(kind, ctx.world, 0)
    inputs = [torch.zeros(each.count, dtype=BF16, device=ctx.device) for each in sent]
    graph, side, wrong = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    with comm.capture(), capturing(graph):
        outs = issue_forked(sent, inputs, comm.group_name, torch.cuda.current_stream(), side)
    for turn in range(3):
        sent = forked_calls(kind, ctx.world, turn)
        for each, x in zip(sent, inputs, strict=True):
            x.copy_(rows.window(ctx.rank, each.start, each.count))
        synchronize(ctx)
        graph.replay()
        synchronize(ctx)
        wrong += wrong_results(rows, sent, outs, ctx.rank, f"replay {turn}")
    comm.check()
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_of_processes_that_forks_and_joins(processes: Pools, kind: str) -> None:
    assert_none_wrong(processes.of(2).run(forked, kind, deadline=60))


# --- two calls at once, which the contract forbids


@dataclass(frozen=True)
class AtOnce:
    """What a rank saw of two graphs replayed at once, and what worked afterwards."""

    took: float
    checked: str
    right: bool
    usable: bool
    on_new_communicator: list[float]


def captured_sums(
    op: str, x: Tensor, times: int, group_name: str, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream=stream):
        outs = [call(op, x, group_name) for _ in range(times)]
    return graph, outs


def replayed_at_once(ctx: RankContext, op: str) -> AtOnce:
    """Two graphs of 50 calls each, behind one gate, on two streams."""
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group, ctx.device)
    values = [torch.full((2000,), factor * (ctx.rank + 1), device=ctx.device) for factor in (1.0, 10.0)]
    totals = [factor * sum(range(1, ctx.world + 1)) for factor in (1.0, 10.0)]
    with comm.capture():
        captured = [captured_sums(op, x, 50, comm.group_name) for x in values]
    streams, gate = (torch.cuda.Stream(), torch.cuda.Stream()), torch.cuda.Event()
    synchronize(ctx)
    start = time.monotonic()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(GATE_CYCLES)
        gate.record()
    streams[1].wait_event(gate)
    for stream, (graph, _) in zip(streams, captured, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()
    took = time.monotonic() - start
    checked = error_text(comm.check)
    got = zip(totals, captured, strict=True)
    right = all(bool((out == total).all()) for total, (_, outs) in got for out in outs)
    usable = torch.ones(4, device=ctx.device).sum().item() == 4
    dist.barrier(ctx.group)
    later = error_text(lambda: call(op, values[0], comm.group_name))  # what a peer has seen is known by now
    torch.cuda.synchronize()
    checked = checked or later or error_text(comm.check)
    dist.barrier(ctx.group)
    captured.clear()
    comm.close()
    dist.barrier(ctx.group)
    with sgl_comm.init(group, ctx.device) as again:
        summed = [call(each, torch.ones(2000, device=ctx.device), again.group_name) for each in (op, "auto")]
        on_new_communicator = torch.cat(summed).unique().tolist()
        synchronize(ctx)
    dist.destroy_process_group(group)
    return AtOnce(took, checked, right, usable, on_new_communicator)


@pytest.mark.parametrize("again", range(3))
@pytest.mark.parametrize("op", ["auto", "two_shot", "v1"])
def test_graphs_replayed_at_once_end_in_the_right_result_or_an_error(processes: Pools, op: str, again: int) -> None:
    results: list[AtOnce] = processes.of(2).run(replayed_at_once, op, deadline=60)
    for rank, result in enumerate(results):
        missing = f"for rank {1 - rank}, which never came", f"for rank {rank}, which never came"
        known = ("two calls ran at once on rank", *missing)
        assert result.took < 4 * TIMEOUT_S, result
        assert result.right or any(text in result.checked for text in known), results
        assert result.usable
        assert result.on_new_communicator == [2.0], results


@dataclass(frozen=True)
class Overlap:
    """What simulated ranks saw of two launches of rank 0 at once, before rank 1 called or without its calls."""

    took: float
    faults: list[str]
    right_or_nan: bool
    all_nan: bool
    usable: bool
    on_new_ranks: list[list[float]]


def overlap_of_rank_0(ctx: RankContext, op: str, second: str, rank_1_comes: bool) -> Overlap:
    """Rank 0 replays a graph, and while it waits for rank 1 another one, or makes an eager call, on a second stream."""
    device = ctx.device
    x = torch.ones(1000, device=device)
    with make_simulated(2, device=device.index or 0) as ranks:
        other = torch.cuda.Stream()
        graph, outs = captured_sums(op, x, 1, ranks[0].group_name, ranks[0].stream)
        if second == "graph":
            second_graph, more = captured_sums(op, x, 1, ranks[0].group_name, other)
        for stream in (other, ranks[1].stream):
            with torch.cuda.stream(stream):
                held = [torch.empty_like(x) for _ in range(3)]
                held.clear()  # and there for the results
        torch.cuda.synchronize()
        start = time.monotonic()
        with torch.cuda.stream(ranks[0].stream):
            graph.replay()
        time.sleep(0.1)  # it waits for rank 1 by now
        with torch.cuda.stream(other):
            if second == "graph":
                second_graph.replay()
            else:
                more = [call(op, x, ranks[0].group_name)]
        time.sleep(0.1)  # and this one has seen it, or waits too
        outs += more
        refused = [error_text(lambda: outs.append(simulated_call(ranks[1], op, x))) for _ in range(2 * rank_1_comes)]
        torch.cuda.synchronize()
        took = time.monotonic() - start
        refused.append(error_text(lambda: outs.append(simulated_call(ranks[1], op, x))))
        torch.cuda.synchronize()
        faults = [ranks[0].fault(), *(text for text in (*refused, ranks[1].fault()) if text)]
        right_or_nan = all(bool(((out == 2 + (op == "norm")) | out.isnan()).all()) for out in outs)
        all_nan = all(bool(out.isnan().all()) for out in outs)
        usable = torch.ones(4, device=device).sum().item() == 4
    with make_simulated(2, device=device.index or 0) as ranks:
        torch.cuda.synchronize()
        sums = [simulated_call(rank, "auto" if op == "norm" else op, x) for rank in ranks]
        torch.cuda.synchronize()
        on_new_ranks = [out.unique().tolist() for out in sums]
    return Overlap(took, faults, right_or_nan, all_nan, usable, on_new_ranks)


def simulated_call(rank: SimulatedRank, op: str, x: Tensor) -> Tensor:
    with torch.cuda.stream(rank.stream):
        return call(op, x, rank.group_name)


@pytest.mark.parametrize("second", ["graph", "eager"])
@pytest.mark.parametrize("op", ["one_shot", "two_shot", "one_shot_ring", "two_shot_ring", "norm", "v1"])
def test_two_launches_at_once_are_detected(short_one_process: Pools, op: str, second: str) -> None:
    (result,) = short_one_process.of(1).run(overlap_of_rank_0, op, second, True, deadline=60)
    assert len(result.faults) >= 2, result
    assert all("two calls ran at once on rank 0" in fault for fault in result.faults), result
    assert result.took < TIMEOUT_S, result
    assert result.right_or_nan, result
    assert result.usable
    assert result.on_new_ranks == [[2.0], [2.0]]


@pytest.mark.parametrize("op", ["one_shot", "two_shot_ring", "norm", "v1"])
def test_two_launches_at_once_end_though_their_peer_never_comes(short_one_process: Pools, op: str) -> None:
    (result,) = short_one_process.of(1).run(overlap_of_rank_0, op, "graph", False, deadline=60)
    known = ("two calls ran at once on rank 0", "for rank 1, which never came")
    assert len(result.faults) >= 2, result
    assert all(any(text in fault for text in known) for fault in result.faults), result
    assert result.took < 3 * TIMEOUT_S, result
    assert result.all_nan, result
    assert result.usable
    assert result.on_new_ranks == [[2.0], [2.0]]
