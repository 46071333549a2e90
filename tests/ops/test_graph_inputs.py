"""capture(): V1's captured calls read their inputs where they lie, and what goes wrong in it is known to every rank."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import Compared, assert_none_wrong, differences
from helpers.errors import error_with_type
from helpers.ranks import Pools, capturing, synchronize
from helpers.rows import Rows, call, compared
from sgl_comm import reference
from sgl_comm.backends import capability
from sgl_comm.backends.capability import Survey
from sgl_comm.testing import RankContext, run_ranks

MIB = 1 << 20
BF16 = torch.bfloat16


# --- what goes in and out of graphs


@dataclass(frozen=True)
class Held:
    """A call in a graph: with so many elements; on the ranks of `offset_on` one element past an aligned address."""

    op: str
    count: int
    dtype: torch.dtype = BF16
    offset_on: tuple[int, ...] = ()


def own_group(ctx: RankContext) -> tuple[dist.ProcessGroup, sgl_comm.Communicator]:
    """A communicator that a test may ruin."""
    group = dist.new_group(list(range(ctx.world)))
    return group, sgl_comm.init(group, ctx.device)


def give_up(ctx: RankContext, group: dist.ProcessGroup, comm: sgl_comm.Communicator) -> None:
    synchronize(ctx)
    dist.barrier(ctx.group)
    comm.close()
    dist.destroy_process_group(group)


def mappings(comm: sgl_comm.Communicator) -> dict[str, int]:
    assert comm._v1 is not None
    return comm._v1.open_mappings()


def captured(
    ctx: RankContext,
    comm: sgl_comm.Communicator,
    held: Sequence[Held],
    capture: Callable[[], AbstractContextManager[None]],
    warm_up: bool = False,
) -> tuple[list[str], dict[str, int]]:
    """The calls, eager and in a graph that is replayed with other numbers: what is wrong; and the open mappings.

    warm_up: makes the eager calls inside ``capture()``, before the graph.
    """
    rows = {each.dtype: Rows(ctx.world, each.dtype, ctx.device, max(h.count for h in held)) for each in held}
    inputs = []
    for each in held:
        offset = int(ctx.rank in each.offset_on)
        inputs.append(torch.empty(each.count + offset, dtype=each.dtype, device=ctx.device)[offset:])

    def fill(turn: int) -> None:
        for number, (each, x) in enumerate(zip(held, inputs, strict=True)):
            x.copy_(rows[each.dtype].window(ctx.rank, 64 * turn + 2 * number, each.count))
        synchronize(ctx)

    def issue() -> list[Tensor]:
        return [call(each.op, x, comm.group_name) for each, x in zip(held, inputs, strict=True)]

    def wrong(outs: Sequence[Tensor], turn: int, label: str) -> list[str]:
        synchronize(ctx)
        results = []
        for number, (each, out) in enumerate(zip(held, outs, strict=True)):
            expected = rows[each.dtype].expected(each.op, ctx.rank, 64 * turn + 2 * number, each.count)
            results.append(compared(each.op, f"{label}, {each}", out, expected))
        return differences(results)

    fill(0)
    found = [] if warm_up else wrong(issue(), 0, "eager")
    graph = torch.cuda.CUDAGraph()
    with capture():
        if warm_up:
            found += wrong(issue(), 0, "warm-up inside capture()")
        with capturing(graph):
            outs = issue()
    for turn in (1, 2, 3):
        fill(turn)
        graph.replay()
        found += wrong(outs, turn, f"replay {turn}")
    comm.check()
    return found, mappings(comm)


DIRECT = (Held("v1", 8192), Held("v1", 64), Held("v1", 100_000), Held("v1", 4096, torch.float32))
STAGED = (Held("v1", 1), Held("v1", 8191), Held("v1", 8192, offset_on=tuple(range(8))))
"""Not whole packs, or not aligned on any rank."""
MIXED = (Held("v1", 8192, offset_on=(1,)), Held("v1", 5 * MIB, offset_on=(0, 2)), Held("v1", 8192, torch.float16))
"""Staged on some ranks and read where they lie on others; one in pieces."""
V2 = (Held("auto", 8192), Held("two_shot", 1001), Held("all_gather", 100))


def inputs_where_they_lie(ctx: RankContext, how: str) -> list[str]:
    group, comm = own_group(ctx)
    held = {"direct": DIRECT, "staged": STAGED, "mixed": (*MIXED, *V2)}[how]
    wrong, seen = captured(ctx, comm, held, comm.capture, warm_up=how == "direct")
    if (seen["open"] > 0) != (how != "staged") or seen["calls"] < sum(each.op == "v1" for each in held):
        wrong.append(f"{how}: got mappings {seen}")
    give_up(ctx, group, comm)
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["direct", "staged", "mixed"])
def test_captured_inputs_of_every_kind(how: str, world: int) -> None:
    assert_none_wrong(run_ranks(inputs_where_they_lie, world, how, device="cuda"))


def captured_without_capture(ctx: RankContext) -> list[str]:
    """V1's calls in a graph that was captured outside capture(), then in one inside it, of one communicator."""
    group, comm = own_group(ctx)
    wrong, seen = captured(ctx, comm, DIRECT, nullcontext)
    if seen["open"] or seen["calls"]:
        wrong.append(f"outside capture(): got mappings {seen}; expected none")
    inside, seen = captured(ctx, comm, DIRECT, comm.capture)
    if not seen["open"]:
        wrong.append(f"inside capture(): got mappings {seen}; expected some")
    give_up(ctx, group, comm)
    return wrong + inside


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_calls_captured_outside_capture_are_right_too(world: int) -> None:
    assert_none_wrong(run_ranks(captured_without_capture, world, device="cuda"))


@contextmanager
def v2_not_serving() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capability, "survey", lambda link, device: Survey("no NVLink, says this test", ""))
        yield


def in_place(ctx: RankContext) -> list[str]:
    """all_reduce and all_reduce_ where V1 serves the front door: peers must not read what is being overwritten."""
    with v2_not_serving():
        group, comm = own_group(ctx)
    assert comm.backend == "v1"
    counts = (8192, 1001, 5 * MIB)
    rows = Rows(ctx.world, BF16, ctx.device, max(counts))
    inputs = [torch.empty(count, dtype=BF16, device=ctx.device) for count in (*counts, *counts)]
    graph, wrong = torch.cuda.CUDAGraph(), []

    def issue() -> list[Tensor]:
        for x in inputs[:3]:
            comm.all_reduce_(x)
        return [comm.all_reduce(x) for x in inputs[3:]]

    def fill(turn: int) -> None:
        for number, x in enumerate(inputs):
            x.copy_(rows.window(ctx.rank, 64 * turn + 2 * number, x.numel()))
        synchronize(ctx)

    def check(outs: Sequence[Tensor], turn: int, label: str) -> list[str]:
        synchronize(ctx)
        got = [*inputs[:3], *outs]
        return differences(
            Compared(
                f"{label}, {x.numel()} elements, number {number}",
                x,
                rows.expected("v1", ctx.rank, 64 * turn + 2 * number, x.numel()),
            )
            for number, x in enumerate(got)
        )

    fill(0)
    wrong += check(issue(), 0, "eager")
    with comm.capture(), capturing(graph):
        outs = issue()
    for turn in (1, 2):
        fill(turn)
        graph.replay()
        wrong += check(outs, turn, f"replay {turn}")
    comm.check()
    give_up(ctx, group, comm)
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_in_place_calls_where_v1_serves_the_front_door(world: int) -> None:
    assert_none_wrong(run_ranks(in_place, world, device="cuda"))


def temporaries(ctx: RankContext) -> list[str]:
    """Inputs that are made in the graph and freed in it, so that the next ones take their memory."""
    group, comm = own_group(ctx)
    count, factors = 20_000, (1.0, 3.0, 0.5, -2.0, 7.0, 1.5)
    rows = Rows(ctx.world, BF16, ctx.device, count)
    x = torch.ones(count, dtype=BF16, device=ctx.device)
    x.mul(factors[0])  # loads torch's kernel, which a capture should not do
    graph, outs, wrong = torch.cuda.CUDAGraph(), [], []
    with comm.capture(), capturing(graph):
        for factor in factors:
            temporary = x * factor
            outs.append(call("v1", temporary, comm.group_name))
            del temporary
    for turn in range(3):
        x.copy_(rows.window(ctx.rank, 64 * turn, count))
        synchronize(ctx)
        graph.replay()
        synchronize(ctx)
        every = [rows.window(rank, 64 * turn, count) for rank in range(ctx.world)]
        expected = [reference.all_reduce([one * factor for one in every]) for factor in factors]
        labels = [f"replay {turn}, times {factor}" for factor in factors]
        wrong += differences(map(Compared, labels, outs, expected))
    comm.check()
    give_up(ctx, group, comm)
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_temporaries_that_are_freed_during_the_capture(world: int) -> None:
    assert_none_wrong(run_ranks(temporaries, world, device="cuda"))


# --- memory that cannot be shared


@pytest.fixture(scope="module")
def expandable_pools() -> Iterator[Pools]:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    pools = Pools(dict.fromkeys(names, "expandable_segments:True"), make_comm=True)
    yield pools
    pools.close()


def is_expandable(x: Tensor) -> bool:
    place = x.data_ptr()
    segments = torch.cuda.memory_snapshot()
    return any(
        each.get("is_expandable", False) and each["address"] <= place < each["address"] + each["total_size"]
        for each in segments
    )


def set_expandable(on: bool) -> None:
    """For memory from here on. The variables do it too, unless torch has read them when it was imported."""
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    setter(f"expandable_segments:{on}")


def with_expandable_segments(ctx: RankContext, plain_on: tuple[int, ...]) -> list[str]:
    """V1 and V2 where some ranks' memory, or all of it, cannot be shared."""
    torch.cuda.empty_cache()
    set_expandable(ctx.rank not in plain_on)
    group, comm = own_group(ctx)
    probe = torch.empty(32 * MIB, dtype=torch.uint8, device=ctx.device)
    wrong = []
    if is_expandable(probe) == (ctx.rank in plain_on):
        wrong.append(f"the memory is {'' if is_expandable(probe) else 'not '}expandable, which this test did not want")
    del probe
    found, seen = captured(ctx, comm, (*DIRECT, *STAGED, *V2), comm.capture)
    shared_by_peers = [rank for rank in plain_on if rank != ctx.rank]
    if (seen["open"] > 0) != bool(shared_by_peers):
        wrong.append(f"got mappings {seen}; expected those of ranks {shared_by_peers} alone")
    give_up(ctx, group, comm)
    set_expandable(True)
    return wrong + found


@pytest.mark.gpu
@pytest.mark.parametrize("plain_on", [(), (1,)], ids=["on all ranks", "on rank 0 alone"])
def test_memory_that_cannot_be_shared_is_staged(expandable_pools: Pools, plain_on: tuple[int, ...]) -> None:
    assert_none_wrong(expandable_pools.of(2).run(with_expandable_segments, plain_on, deadline=60))


# --- graphs that are dropped


@dataclass(frozen=True)
class Drops:
    """What a rank saw while graphs were dropped and captured anew: after each, and of its memory in the end."""

    right: bool
    mappings: list[dict[str, int]]
    free: list[int]
    free_before: int
    free_after: int


def free_memory(ctx: RankContext) -> int:
    """Of the device, when no rank does anything."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    synchronize(ctx)
    free = torch.cuda.mem_get_info()[0]
    synchronize(ctx)
    return free


def one_graph(ctx: RankContext, comm: sgl_comm.Communicator, number: int) -> tuple[bool, dict[str, int]]:
    """A graph with an input of its own and one in the graph's memory; everything is dropped on return."""
    value = float(number % 5 + ctx.rank + 1)
    x = torch.full((MIB,), value, dtype=BF16, device=ctx.device)
    (x + x).sum()  # loads torch's kernels, which a capture should not do
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), capturing(graph):
        double = x + x
        outs = [call("v1", x, comm.group_name), call("v1", double, comm.group_name)]
    seen = mappings(comm)
    synchronize(ctx)
    graph.replay()
    synchronize(ctx)
    total = sum(float(number % 5 + rank + 1) for rank in range(ctx.world))
    right = bool((outs[0] == total).all()) and bool((outs[1] == 2 * total).all())
    synchronize(ctx)
    return right, seen


def dropped_and_captured_anew(ctx: RankContext, times: int) -> Drops:
    group, comm = own_group(ctx)
    for number in range(3):  # so that the driver and torch hold what they keep for good
        one_graph(ctx, comm, number)
    comm.close()
    synchronize(ctx)
    free_before = free_memory(ctx)
    comm = sgl_comm.init(group, ctx.device)
    right, seen, free = True, [], []
    for number in range(times):
        now_right, now_seen = one_graph(ctx, comm, number)
        right &= now_right
        seen.append(now_seen)
        free.append(free_memory(ctx))
    comm.check()
    synchronize(ctx)
    comm.close()
    synchronize(ctx)
    free_after = free_memory(ctx)
    dist.destroy_process_group(group)
    return Drops(right, seen, free, free_before, free_after)


@pytest.mark.gpu
def test_graphs_that_are_dropped_leave_nothing_behind() -> None:
    for result in run_ranks(dropped_and_captured_anew, 2, 100, device="cuda", deadline=240):
        assert result.right
        for name in ("open", "calls"):
            held = [each[name] for each in result.mappings]
            assert min(held) > 0
            assert max(held[50:]) <= max(held[:50]) + 4, f"{name}: {held}"
            assert max(held) <= 40, f"{name}: {held}"
        assert all(each["closed"] <= each["opened"] for each in result.mappings)
        assert all(each["opened"] - each["closed"] == each["open"] for each in result.mappings)
        assert result.mappings[-1]["opened"] >= 100, "each graph's memory is new, and so must its mappings be"
        assert min(result.free[90:]) >= min(result.free[40:60]) - 8 * MIB, result.free
        assert result.free_after >= result.free_before - 16 * MIB


# --- graphs that are replayed too early


@dataclass(frozen=True)
class TooEarly:
    """What a rank saw of a graph whose inputs the ranks had not told each other, and what worked afterwards."""

    nan: list[bool]
    checked: str
    later: str
    usable: bool
    works: list[str]


def all_nan(x: Tensor) -> bool:
    return bool(x.isnan().all())


def replayed_unregistered(ctx: RankContext, when: str) -> TooEarly:
    """when: "inside" capture() by all ranks or by "rank 0" alone first, or "after an error" of rank 1 in it."""
    group, comm = own_group(ctx)
    x = torch.ones(8192, dtype=BF16, device=ctx.device)
    graph = torch.cuda.CUDAGraph()
    nan = []

    def replay() -> None:
        outs[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        nan.append(all_nan(outs[0]))

    outs: list[Tensor] = []
    try:
        with comm.capture():
            with capturing(graph):
                outs.append(call("v1", x, comm.group_name))
            if when == "after an error" and ctx.rank == 1:
                raise ValueError("planted")
            if when == "inside" or (when == "rank 0" and ctx.rank == 0):
                replay()
    except (ValueError, sgl_comm.SglCommError):
        assert when == "after an error"
    dist.barrier(ctx.group)
    replay()
    checked = error_with_type(comm.check)
    later = error_with_type(lambda: call("v1", x, comm.group_name))
    usable = torch.ones(4, device=ctx.device).sum().item() == 4
    dist.barrier(ctx.group)
    comm.close()
    dist.barrier(ctx.group)
    comm = sgl_comm.init(group, ctx.device)
    works, _ = captured(ctx, comm, (*DIRECT, *V2), comm.capture)
    give_up(ctx, group, comm)
    return TooEarly(nan, checked, later, usable, works)


@pytest.fixture(scope="module")
def short_pools() -> Iterator[Pools]:
    pools = Pools({"SGLCOMM_TIMEOUT": "5"})
    yield pools
    pools.close()


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["inside", "rank 0", "after an error"])
def test_a_replay_before_the_inputs_are_known_fails_softly(short_pools: Pools, when: str) -> None:
    for result in short_pools.of(2).run(replayed_unregistered, when, deadline=60):
        assert all(result.nan), result
        assert "before its inputs were registered" in result.checked
        assert result.checked.startswith("SglCommError: check: rank")
        assert "before its inputs were registered" in result.later
        assert result.usable
        assert result.works == []


# --- errors inside capture()


def errors_inside(ctx: RankContext) -> dict[str, str]:
    """What each rank gets when some raise inside capture(); the last rank is the one that fails."""
    group, comm = own_group(ctx)
    last = ctx.rank == ctx.world - 1
    x = torch.ones(8192, device=ctx.device)

    def raise_after() -> None:
        with comm.capture():
            comm.all_reduce(x)
            if last:
                raise KeyError("planted")

    def raise_on_all() -> None:
        with comm.capture():
            raise ValueError(f"planted on {ctx.rank}")

    seen = {"one": error_with_type(raise_after), "all": error_with_type(raise_on_all)}
    if ctx.device.type == "cuda":
        seen |= errors_in_graphs(ctx, comm, last)
    with comm.capture():
        total = comm.all_reduce(x)
    seen["afterwards"] = str(total.unique().tolist())
    give_up(ctx, group, comm)
    return seen


def errors_in_graphs(ctx: RankContext, comm: sgl_comm.Communicator, last: bool) -> dict[str, str]:
    """The same around graphs of V1's calls, and graphs that differ between the ranks."""
    x = torch.ones(8192, device=ctx.device)

    def graph_of(calls: int, count: int = 8192, planted: bool = False) -> None:
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), capturing(graph):
            for _ in range(calls):
                call("v1", x[:count], comm.group_name)
            if planted:
                raise KeyError("planted")

    def nested() -> None:
        with comm.capture(), comm.capture():
            pass

    seen = {
        "in a graph": error_with_type(lambda: graph_of(2, planted=last)),
        "other calls": error_with_type(lambda: graph_of(1 if last else 2)),
        "no calls": error_with_type(lambda: graph_of(0 if last else 1)),
        "other sizes": error_with_type(lambda: graph_of(2, count=4096 if last else 8192)),
        "nested": error_with_type(nested),
    }
    found, _ = captured(ctx, comm, DIRECT, comm.capture)
    return seen | {"right": "; ".join(found)}


def assert_all_know(results: Sequence[dict[str, str]], planted: Sequence[str]) -> None:
    failing = len(results) - 1
    for name in planted:
        texts = [each[name] for each in results]
        assert texts[failing] == "KeyError: 'planted'", texts
        expected = f"SglCommError: capture: rank {failing}: KeyError: 'planted'"
        assert all(text == expected for text in texts[:failing]), texts
    assert [each["all"] for each in results] == [f"ValueError: planted on {rank}" for rank in range(len(results))]
    assert all(each["afterwards"] == f"[{len(results)}.0]" for each in results)


@pytest.mark.parametrize("world", [2, 3])
def test_an_error_inside_capture_is_known_to_all_on_the_cpu(world: int) -> None:
    assert_all_know(run_ranks(errors_inside, world, deadline=30), ["one"])


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_an_error_inside_capture_is_known_to_all(short_pools: Pools, world: int) -> None:
    results = short_pools.of(world).run(errors_inside, deadline=60)
    assert_all_know(results, ["one", "in a graph"])
    for name, words in (
        ("other calls", "expected the same calls on every rank"),
        ("no calls", "expected the same calls on every rank"),
        ("other sizes", "bytes"),
        ("nested", "a capture() inside a capture()"),
    ):
        assert all(words in each[name] for each in results), (name, results)
    assert all(each["right"] == "" for each in results), results
