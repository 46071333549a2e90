"""all_reduce between real processes: every result equals the fp32 rank-order oracle, bit for bit, on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.calls import AllReduce, Batch, run_awkward_values, run_calls, run_every_layout
from helpers.compare import difference, owners
from helpers.errors import error_text
from helpers.ranks import Ranks, capturing, synchronize
from helpers.values import DTYPES, awkward_values, generator, name_of, random_values
from sgl_comm import reference, testing
from sgl_comm.testing import RankContext, RankPool

SHAPES: tuple[tuple[int, ...], ...] = (
    *((0,), (0, 3)),
    *((1,), ()),
    (7,),
    *((8,), (2, 4)),
    *((1000,), (10, 100), (5, 10, 20)),
    *((1040,), (26, 40), (2, 4, 10, 13)),
    *((65536,), (64, 1024), (4, 16, 32, 32)),
    *((2**20 + 3,), (7, (2**20 + 3) // 7)),
)
"""Shapes of 0, 1, 7, 8, 1000, 1040, 65536 and 2**20 + 3 elements."""

SMALL_SLOT = 64 << 10
"""The smallest ``max_size``: a GPU message above it goes through the ring."""

ALGORITHMS = ("one_shot", "two_shot", "one_shot_ring", "two_shot_ring")


@contextmanager
def further_groups(
    ctx: RankContext, divisions: Sequence[Sequence[Sequence[int]]]
) -> Iterator[list[tuple[str, list[int]]]]:
    """Communicators of further groups: for each division of the ranks into groups, the one this rank is in."""
    mine: list[tuple[list[int], dist.ProcessGroup]] = []
    for division in divisions:
        for ranks in division:
            group = dist.new_group(list(ranks))
            if ctx.rank in ranks:
                mine.append((list(ranks), group))
    comms = [sgl_comm.init(group, ctx.device, max_size=SMALL_SLOT) for _, group in mine]
    yield [(group.group_name, ranks) for ranks, group in mine]
    synchronize(ctx)
    for comm in comms:
        comm.close()
    for _, group in mine:
        dist.destroy_process_group(group)


def over_several_groups(ctx: RankContext, count: int) -> list[str]:
    everyone = list(range(ctx.world))
    divisions = [[everyone]]
    if ctx.world == 4:
        divisions += [[[0, 1], [2, 3]], [[0, 3], [1, 2]]]
    sizes = (0, 1, 7, 8, 1000, 1040, 4096, 5000, 20000, 70001)
    with further_groups(ctx, divisions) as others:
        groups = [(ctx.group.group_name, everyone), *others]
        calls = []
        for number in range(count):
            chance = random.Random(number)
            name, ranks = groups[number % len(groups)]
            shape, dtype = (chance.choice(sizes),), chance.choice(DTYPES)
            layouts = [x for x in testing.layouts(shape).values() if not x.overlaps]
            values = random_values(ctx.world, shape, dtype, "call", number)
            calls.append(
                AllReduce(
                    name_of("call", number, dtype, shape, "in ranks", ranks),
                    [values[rank] for rank in ranks],
                    [chance.choice(layouts) for _ in ranks],
                    name,
                    ranks.index(ctx.rank),
                    number // len(groups) % 2 == 1,
                )
            )
        return run_calls(ctx, calls)


def back_to_back(ctx: RankContext, calls: int, count: int) -> list[str]:
    """Calls without a pause, each with numbers of its own: a slot used again too early shows in a sum."""
    numbers = [torch.arange(ctx.world) + 1 + call % 61 for call in range(calls)]
    inputs = [torch.full((count,), float(number[ctx.rank])) for number in numbers[:61]]
    wrong = []
    for call in range(calls):
        out = torch.ops.sgl_comm.all_reduce(inputs[call % 61], ctx.group.group_name)
        expected = float(numbers[call].sum())
        if out[0] != expected or not bool((out == out[0]).all()):
            wrong.append(f"call {call}: got {out.unique().tolist()}, expected {expected}")
    return wrong


def fallback(ctx: RankContext) -> list[str]:
    """Other dtypes and reduce ops, with values that any order sums alike."""

    def sum_of(x: Tensor) -> Tensor:
        return x.sum(0, dtype=x.dtype)

    cases: list[tuple[torch.dtype, str, Callable[[Tensor], Tensor]]] = [
        (torch.int64, "sum", sum_of),
        (torch.int32, "sum", sum_of),
        (torch.uint8, "sum", sum_of),
        (torch.float64, "sum", sum_of),
        (torch.float32, "max", lambda x: x.amax(0)),
        (torch.bfloat16, "min", lambda x: x.amin(0)),
        (torch.float32, "product", lambda x: x.prod(0)),
        (torch.int64, "max", lambda x: x.amax(0)),
    ]
    wrong = []
    group = ctx.group.group_name
    for dtype, op, combine in cases:
        for shape in ((1000,), (6, 10), (0,)):
            every = torch.randint(0, 4, (ctx.world, *shape), generator=generator(dtype, op, shape)).to(dtype)
            expected = combine(every) if every.numel() else every[0]
            for layout in testing.layouts(shape).values():
                if layout.overlaps or (ctx.device.type == "cuda" and layout.name not in ("row_major", "transposed")):
                    continue
                label = name_of(dtype, op, shape, layout.name)
                placed = layout(every[ctx.rank].to(ctx.device))
                out = torch.ops.sgl_comm.all_reduce(placed.tensor, group, op)
                wrong += difference(out.cpu(), expected, label)
                wrong += difference(placed.tensor, placed.values, f"{label}, its input afterwards")
                if not out.is_contiguous() or (out.numel() and owners(out, [placed.buffer])):
                    wrong.append(f"{label}: the result is not fresh and row-major")
                torch.ops.sgl_comm.all_reduce_(placed.tensor, group, op)
                wrong += difference(placed.tensor.cpu(), expected, f"{label}, in place")
                if placed.overwritten():
                    wrong.append(f"{label}: bytes around the tensor were overwritten")
    return wrong


def average(ctx: RankContext) -> list[str]:
    """`avg` is what the group's own backend makes of it: the average, or an error on every rank and no harm."""
    every = torch.randint(0, 4, (ctx.world, 40), generator=generator("avg")).float() * ctx.world
    mine = every[ctx.rank].to(ctx.device)
    try:
        dist.all_reduce(mine.clone(), dist.ReduceOp.AVG, group=ctx.group)
        served = True
    except (RuntimeError, ValueError):
        served = False
    wrong = []
    try:
        out = sgl_comm.ops.all_reduce(mine, ctx.group.group_name, "avg")
        if not served:
            wrong.append("avg: the backend refuses it, but there was no error")
        wrong += difference(out.cpu(), every.mean(0), "avg")
    except sgl_comm.SglCommError as error:
        if served or "all_reduce" not in str(error) or "avg" not in str(error):
            wrong.append(f"avg: {error}")
    out = sgl_comm.ops.all_reduce(mine, ctx.group.group_name)
    return wrong + difference(out.cpu(), reference.all_reduce(list(every)), "the call after avg")


def v2_algorithms(ctx: RankContext) -> list[str]:
    """Messages through each algorithm by name; those above 8 MiB go through a ring whatever is asked."""
    flat = [(1,), (1040,), (65537,), (2**18 + 5,)]
    large = [((9 << 20) // 2 + 3,)] if ctx.world <= 3 else []
    calls = []
    for dtype in DTYPES:
        for shape in flat + large:
            for algo in ("auto", *ALGORITHMS):
                for layout in (testing.layouts(shape)["row_major"], testing.layouts(shape)["offset"]):
                    label = name_of("v2", algo, dtype, shape, layout.name)
                    values = random_values(ctx.world, shape, dtype)
                    call = AllReduce(label, values, [layout] * ctx.world, ctx.group.group_name, ctx.rank, algo=algo)
                    calls.append(call)
    return run_calls(ctx, calls)


def v2_refusals(ctx: RankContext) -> dict[str, str]:
    group, device = ctx.group.group_name, ctx.device
    cases = {
        "an unknown algorithm": (torch.zeros(8, device=device), "tree"),
        "another dtype": (torch.zeros(8, device=device, dtype=torch.int32), "auto"),
        "a CPU tensor": (torch.zeros(8), "auto"),
    }
    texts = {}
    for name, (x, algo) in cases.items():
        texts[name] = error_text(lambda x=x, algo=algo: sgl_comm.ops.custom_all_reduce_v2(x, group, algo))
    later = sgl_comm.ops.custom_all_reduce_v2(torch.ones(8, device=device), group).cpu()
    wrong = difference(later, torch.full((8,), float(ctx.world)), "the call after the refusals")
    return texts | ({"after": wrong[0]} if wrong else {})


def captured(ctx: RankContext, replays: int) -> list[str]:
    """Two graphs of one communicator, replayed in turn with changed inputs, an eager call between them."""
    recipes: list[list[tuple[tuple[int, ...], torch.dtype, str, bool]]] = [
        [
            ((7,), torch.float32, "row_major", False),
            ((1040,), torch.bfloat16, "offset", True),
            ((26, 40), torch.float16, "transposed", False),
            ((26, 40), torch.bfloat16, "transposed", True),
            ((65536,), torch.bfloat16, "row_major", True),
            ((2**20 + 3,), torch.float32, "row_major", False),
            ((8,), torch.float32, "row_major", False),
        ],
        [
            ((1000,), torch.float32, "row_major", True),
            ((1040,), torch.bfloat16, "row_major", False),
        ],
    ]

    def batch(which: int, replay: int) -> Batch:
        calls = []
        for number, (shape, dtype, layout_name, in_place) in enumerate(recipes[which]):
            layout = testing.layouts(shape)[layout_name]
            label = name_of("graph", which, "replay", replay, dtype, shape, layout_name, "in place" if in_place else "")
            values = random_values(ctx.world, shape, dtype, which, replay, number)
            calls.append(AllReduce(label, values, [layout] * ctx.world, ctx.group.group_name, ctx.rank, in_place))
        return Batch(ctx, calls)

    def capture(static: Batch) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None]]:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph):
            outs = static.issue()
        return graph, outs

    static = [batch(which, -1) for which in range(len(recipes))]
    for warm_up in static:
        warm_up.issue()
    synchronize(ctx)
    graphs = [capture(one) for one in static]
    wrong = []
    for replay in range(replays):
        for which, (graph, outs) in enumerate(graphs):
            fresh = batch(which, replay)
            static[which].arena.copy_(fresh.arena)
            synchronize(ctx)
            graph.replay()
            eager = torch.ops.sgl_comm.all_reduce(
                torch.full((9,), float(replay), device=ctx.device), ctx.group.group_name
            )
            synchronize(ctx)
            wrong += fresh.failures(outs, static[which].arena)
            expected = torch.full((9,), float(replay * ctx.world))
            wrong += difference(eager.cpu(), expected, f"the eager call after replay {replay} of graph {which}")
    return wrong


def test_every_dtype_size_and_layout(ranks: Ranks) -> None:
    ranks.all_right(run_every_layout, AllReduce, SHAPES, DTYPES)


def test_awkward_values(ranks: Ranks) -> None:
    ranks.all_right(run_awkward_values, AllReduce)


def test_200_calls_of_mixed_sizes_on_interleaved_groups(ranks: Ranks) -> None:
    ranks.all_right(over_several_groups, 200)


@pytest.mark.parametrize("world", [2, 4])
def test_many_small_calls_back_to_back(world: int) -> None:
    Ranks("cpu", world).all_right(back_to_back, 10_000, 2000)


def test_other_dtypes_and_reduce_ops_take_the_fallback(ranks: Ranks) -> None:
    ranks.all_right(fallback)
    ranks.all_right(average)


def test_a_captured_graph_is_replayed_20_times_with_changed_inputs(gpu_ranks: Ranks) -> None:
    gpu_ranks.all_right(captured, 20)


def test_v2_gives_the_same_bits_by_every_algorithm(gpu_ranks: Ranks) -> None:
    gpu_ranks.all_right(v2_algorithms)


def test_v2_refuses_what_it_cannot_do(gpu_ranks: Ranks) -> None:
    for texts in gpu_ranks.run(v2_refusals):
        assert set(texts) == {"an unknown algorithm", "another dtype", "a CPU tensor"}, texts
        assert all("custom_all_reduce_v2" in text and "expected" in text for text in texts.values()), texts
        assert "got algo 'tree'; expected auto, one_shot, two_shot" in texts["an unknown algorithm"]
        assert "all_reduce takes every dtype" in texts["another dtype"]
        assert "sgl_comm::all_reduce serves" in texts["a CPU tensor"]


@pytest.mark.parametrize("op", ["custom_all_reduce_v1", "custom_all_reduce_v2"])
def test_v1_and_v2_refuse_cpu_tensors_and_point_to_all_reduce(op: str) -> None:
    with pytest.raises(sgl_comm.SglCommError, match=rf"{op}: got .*\[8\] on cpu; .*all_reduce serves"):
        getattr(sgl_comm.ops, op)(torch.ones(8), "no group is asked for")


@pytest.mark.parametrize("instructions", ["scalar", "avx2"])
def test_every_instruction_set_gives_the_same_bits(instructions: str) -> None:
    shapes = [(7,), (1040,), (26, 40), (65536,)]
    with RankPool(3, env={"SGLCOMM_CPU_INSTRUCTIONS": instructions}) as pool:
        for fn, args in ((run_every_layout, (AllReduce, shapes, DTYPES)), (run_awkward_values, (AllReduce,))):
            assert pool.run(fn, *args, deadline=60) == [[], [], []]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_awkward_values_are_what_they_say(dtype: torch.dtype) -> None:
    """The tests above would show nothing if the sums of these were not awkward."""
    kinds = awkward_values(3, dtype)
    sums = {kind: reference.all_reduce(values) for kind, values in kinds.items()}
    exact = {kind: torch.stack(values).double().sum(0) for kind, values in kinds.items()}
    assert sums["special grid"].isnan().any()
    assert sums["sentinel words"].isnan().all()
    assert {word % (1 << 32) for word in kinds["sentinel words"][0].view(torch.int32).tolist()} == {0xFFFFFFFF}
    assert 0xFFFFFFFF in {word % (1 << 32) for word in kinds["special"][0].view(torch.int32).tolist()}
    assert set(sums["zeros"].signbit().tolist()) == {True, False}
    assert {str(x) for x in sums["infinities"].tolist()} >= {"nan", "inf", "-inf"}
    testing.assert_bits_equal(sums["integers"].double(), exact["integers"])
    assert sums["overflow"].isinf().any()
    assert sums["overflow"].isfinite().any()
    assert ((sums["subnormals"].abs() < torch.finfo(dtype).tiny) & (sums["subnormals"] != 0)).any()
    assert all((values.abs() < torch.finfo(dtype).tiny).all() for values in kinds["subnormals"])
    assert (sums["ties"].double() != exact["ties"]).any()
    of_two = torch.stack(kinds["ties"][:2]).double().sum(0)
    assert int(((of_two - of_two.to(dtype).double()).abs() == torch.finfo(dtype).eps / 2).sum()) > 900
