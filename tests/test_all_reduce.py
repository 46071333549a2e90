"""all_reduce between real processes: every result equals the fp32 rank-order oracle, bit for bit, on every rank."""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from sgl_comm import reference, testing
from sgl_comm.testing import Layout, Placed, RankContext, RankPool, run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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

CPU_WORLDS, GPU_WORLDS = (1, 2, 3, 4, 5, 8), (2, 3, 4, 5, 6, 7, 8)
SMALL_SLOT = 64 << 10
"""The smallest ``max_size``: a GPU message above it goes through the ring."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, as every rank of its group knows it: what each rank puts in, in which layout, in rank order."""

    name: str
    values: Sequence[Tensor]
    layouts: Sequence[Layout]
    in_place: bool
    group: str
    rank: int
    algo: str = ""
    """For ``custom_all_reduce_v2``; empty for the front door."""

    def issue(self, x: Tensor) -> Tensor | None:
        if self.algo:
            return torch.ops.sgl_comm.custom_all_reduce_v2(x, self.group, self.algo)
        if self.in_place:
            return torch.ops.sgl_comm.all_reduce_(x, self.group)
        return torch.ops.sgl_comm.all_reduce(x, self.group)

    def expected(self) -> Tensor:
        held = [
            values[:1].expand(values.shape) if layout.overlaps else values
            for layout, values in zip(self.layouts, self.values, strict=True)
        ]
        return reference.all_reduce(held)

    def same_sum(self, other: Call) -> bool:
        """Whether both must give the same, whatever else differs."""
        return self.values is other.values and all(
            mine.overlaps == theirs.overlaps for mine, theirs in zip(self.layouts, other.layouts, strict=True)
        )


class Batch:
    """Calls whose inputs lie in one arena on the device, so that a GPU is asked for results once and not a call."""

    def __init__(self, ctx: RankContext, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.placed: list[Placed] = [call.layouts[call.rank](call.values[call.rank]) for call in calls]
        self.expected: list[Tensor] = []
        for number, call in enumerate(calls):
            known = next((i for i in range(number) if calls[i].same_sum(call)), None)
            self.expected.append(call.expected() if known is None else self.expected[known])
        self.sizes = [placed.buffer.numel() for placed in self.placed]
        self.arena = torch.cat([placed.buffer for placed in self.placed]).to(ctx.device)
        self.inputs = [
            _on_buffer(piece, placed) for piece, placed in zip(self.arena.split(self.sizes), self.placed, strict=True)
        ]

    def issue(self) -> list[Tensor | None]:
        return [call.issue(x) for call, x in zip(self.calls, self.inputs, strict=True)]

    def failures(self, outs: Sequence[Tensor | None], arena: Tensor | None = None) -> list[str]:
        """What is wrong with the results, and with the memory of the inputs; overwrites the results."""
        arena = self.arena if arena is None else arena
        fresh = [out for out in outs if out is not None]
        found = _download(fresh)
        wrong = [
            f"{call.name}: the result shares memory with an input or with another result"
            for call, out in zip(self.calls, outs, strict=True)
            if out is not None and out.numel() > 0 and _owners(out, [arena, *fresh]) != 1
        ]
        for out in fresh:
            out.fill_(3)
        after = arena.cpu()
        values = iter(found)
        for number, piece in enumerate(after.split(self.sizes)):
            placed, out = self.placed[number], outs[number]
            placed.buffer.copy_(piece)
            wrong += self._wrong(number, out, None if out is None else next(values))
        return wrong

    def _wrong(self, number: int, out: Tensor | None, found: Tensor | None) -> Iterator[str]:
        call, placed, expected = self.calls[number], self.placed[number], self.expected[number]
        if call.in_place != (out is None):
            yield f"{call.name}: returned {type(out)}"
        if out is not None and found is not None:
            yield from _differs(found, expected, f"{call.name}, result")
            if out.stride() != torch.empty(out.shape, device="meta").stride():
                yield f"{call.name}: strides of the result: got {out.stride()}, expected row-major for {out.shape}"
        if call.in_place:
            yield from _differs(placed.tensor, expected, f"{call.name}, in place")
        else:
            yield from _differs(placed.tensor, placed.values, f"{call.name}, its input afterwards")
        overwritten = placed.overwritten()
        if overwritten:
            yield f"{call.name}: bytes around the tensor were overwritten, at {overwritten}"


def _on_buffer(piece: Tensor, placed: Placed) -> Tensor:
    flat = piece.view(placed.tensor.dtype)
    like = placed.tensor
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + like.storage_offset())


def _download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Row-major copies on the CPU, fetched at once."""
    if not tensors:
        return []
    flat = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors]).cpu()
    pieces = flat.split([x.numel() * x.element_size() for x in tensors])
    return [piece.clone().view(x.dtype).view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def _owners(out: Tensor, others: Sequence[Tensor]) -> int:
    storage = out.untyped_storage().data_ptr()
    return sum(other.untyped_storage().data_ptr() == storage for other in others)


def _differs(actual: Tensor, expected: Tensor, label: str) -> Iterator[str]:
    words = {2: torch.int16, 4: torch.int32}.get(actual.element_size())
    same_kind = actual.dtype == expected.dtype and actual.device == expected.device
    if words is not None and same_kind and torch.equal(actual.view(words), expected.view(words)):
        return  # the same bits: nothing to look into
    try:
        testing.assert_bits_equal(actual, expected, label)
    except AssertionError as error:
        yield str(error)


def _meet(ctx: RankContext) -> None:
    """Waits until no rank's kernels are on the GPU: a copy would take turns with the waiting ones."""
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
        dist.barrier(ctx.group)


def run_calls(ctx: RankContext, calls: Sequence[Call], flush_denormal: bool = False) -> list[str]:
    """Makes the calls one after the other and returns what is wrong with them."""
    batch = Batch(ctx, calls)
    _meet(ctx)
    try:
        if flush_denormal and not torch.set_flush_denormal(True):
            return []
        outs = batch.issue()
    finally:
        if flush_denormal:
            torch.set_flush_denormal(False)
    _meet(ctx)
    return batch.failures(outs)


def name_of(*words: object) -> str:
    return " ".join(str(word).removeprefix("torch.") for word in words)


def generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name_of(*words).encode()))


@functools.lru_cache(maxsize=1)
def _random_numbers(world: int, shape: tuple[int, ...], seed: str) -> list[Tensor]:
    random_bits = generator(world, shape, seed)

    def one() -> Tensor:
        exponents = torch.randint(-10, 11, shape, generator=random_bits)
        return torch.ldexp(torch.randn(shape, generator=random_bits), exponents)

    return [one() for _ in range(world)]


def random_values(world: int, shape: Sequence[int], dtype: torch.dtype, *seed: object) -> list[Tensor]:
    """Every rank's values, of such different magnitudes that the sum depends on the order and on fp32."""
    return [x.to(dtype) for x in _random_numbers(world, tuple(shape), name_of(*seed))]


def calls_of_every_layout(ctx: RankContext, name: str, values: Sequence[Tensor]) -> list[Call]:
    """Every layout on all ranks alike; then layouts that differ between the ranks."""
    layouts = list(testing.layouts(values[0].shape).values())
    separate = [layout for layout in layouts if not layout.overlaps]
    calls = []
    for in_place, usable in ((False, layouts), (True, separate)):
        how = "in place" if in_place else "functional"
        mixed = [usable[(rank + in_place) % len(usable)] for rank in range(ctx.world)]
        for ranks in [*([layout] * ctx.world for layout in usable), mixed]:
            layout_names = "+".join(dict.fromkeys(layout.name for layout in ranks))
            calls.append(
                Call(name_of(name, layout_names, how), values, ranks, in_place, ctx.group.group_name, ctx.rank)
            )
    return calls


def matrix(ctx: RankContext, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    wrong = []
    for shape in shapes:
        for dtype in DTYPES:
            values = random_values(ctx.world, shape, dtype)
            wrong += run_calls(ctx, calls_of_every_layout(ctx, name_of(dtype, shape), values))
    return wrong


def awkward_values(world: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Kinds of values, each with every rank's 1-D tensor."""
    info = torch.finfo(dtype)
    words = torch.int32 if dtype.itemsize == 4 else torch.int16
    mantissa_bits = round(-torch.tensor(info.eps).log2().item())
    special = testing.special_values(dtype)
    pairs = special.view(-1, 2)
    random_bits = generator(world, dtype, "awkward")

    def below(limit: int, count: int = 2048) -> Tensor:
        return torch.randint(limit, (count,), generator=random_bits)

    def picked(*choices: float) -> list[Tensor]:
        table = torch.tensor(choices, dtype=torch.float64).to(dtype)
        return [table[below(len(table))] for _ in range(world)]

    def grid() -> list[Tensor]:
        """Each value with each of ranks 0, 1 and 2; chance picks those of further ranks."""
        count = len(special) ** min(world, 3)
        places = torch.arange(count)
        return [
            special[places // len(special) ** rank % len(special) if rank < 3 else below(len(special), count)]
            for rank in range(world)
        ]

    def subnormals() -> list[Tensor]:
        bits = [(below((1 << mantissa_bits) - 1) + 1, below(2)) for _ in range(world)]
        return [torch.where(sign > 0, -1, 1) * size.to(words).view(dtype) for size, sign in bits]

    def ties() -> list[Tensor]:
        """Half way between two neighbours, and a hair above or below it where there is a third rank."""
        first = 1 + torch.arange(1024, dtype=torch.float64) % (1 << mantissa_bits) * info.eps
        half = torch.full((1024,), info.eps / 2, dtype=torch.float64)
        half[512:] *= -1
        hair = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)[below(3, 1024)] * info.eps / 128
        rest = [torch.zeros(1024, dtype=torch.float64)] * max(0, world - 3)
        return [x.to(dtype) for x in [first, half, hair, *rest][:world]]

    return {
        "special": [pairs[below(len(pairs), 1024)].flatten() for _ in range(world)],
        "special grid": grid(),
        "sentinel words": [torch.full((1030,), -1, dtype=words).view(dtype)] * world,
        "zeros": picked(0.0, -0.0),
        "infinities": picked(float("inf"), -float("inf"), 1.0),
        "integers": picked(*range(-8, 9)),
        "overflow": picked(info.max, info.max / 2, info.max / 4, info.min, info.min / 2),
        "subnormals": subnormals(),
        "ties": ties(),
    }


def awkward(ctx: RankContext) -> list[str]:
    wrong = []
    for dtype in DTYPES:
        for kind, values in awkward_values(ctx.world, dtype).items():
            calls = calls_of_every_layout(ctx, name_of(dtype, kind), values)
            wrong += run_calls(ctx, calls)
            if ctx.device.type == "cpu":
                wrong += [f"flush to zero, {text}" for text in run_calls(ctx, calls, flush_denormal=True)]
    return wrong


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
    _meet(ctx)
    for comm in comms:
        comm.close()
    for _, group in mine:
        dist.destroy_process_group(group)


def interleaved(ctx: RankContext, count: int) -> list[str]:
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
                Call(
                    name_of("call", number, dtype, shape, "in ranks", ranks),
                    [values[rank] for rank in ranks],
                    [chance.choice(layouts) for _ in ranks],
                    number // len(groups) % 2 == 1,
                    name,
                    ranks.index(ctx.rank),
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
                wrong += _differs(out.cpu(), expected, label)
                wrong += _differs(placed.tensor, placed.values, f"{label}, its input afterwards")
                if not out.is_contiguous() or (out.numel() and _owners(out, [placed.buffer])):
                    wrong.append(f"{label}: the result is not fresh and row-major")
                torch.ops.sgl_comm.all_reduce_(placed.tensor, group, op)
                wrong += _differs(placed.tensor.cpu(), expected, f"{label}, in place")
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
        wrong += _differs(out.cpu(), every.mean(0), "avg")
    except sgl_comm.SglCommError as error:
        if served or "all_reduce" not in str(error) or "avg" not in str(error):
            wrong.append(f"avg: {error}")
    out = sgl_comm.ops.all_reduce(mine, ctx.group.group_name)
    return wrong + list(_differs(out.cpu(), reference.all_reduce(list(every)), "the call after avg"))


def v2_algorithms(ctx: RankContext) -> list[str]:
    """Messages through each algorithm by name; above 4 MiB the one-shot is refused and the ring serves."""
    flat = [(1,), (1040,), (65537,), (2**18 + 5,)]
    large = [((5 << 20) // 4 + 3,)] if ctx.world <= 3 else []
    calls = []
    for dtype in DTYPES:
        for shape in flat + large:
            for algo in ("auto", "one_shot", "ring"):
                if algo == "one_shot" and shape in large and dtype.itemsize == 4:
                    continue
                for layout in (testing.layouts(shape)["row_major"], testing.layouts(shape)["offset"]):
                    label = name_of("v2", algo, dtype, shape, layout.name)
                    values = random_values(ctx.world, shape, dtype)
                    calls.append(Call(label, values, [layout] * ctx.world, False, ctx.group.group_name, ctx.rank, algo))
    return run_calls(ctx, calls)


def v2_refusals(ctx: RankContext) -> dict[str, str]:
    group, device = ctx.group.group_name, ctx.device
    cases = {
        "one_shot above max_size": (torch.zeros((5 << 20) // 4, device=device), "one_shot"),
        "an unknown algorithm": (torch.zeros(8, device=device), "two_shot"),
        "another dtype": (torch.zeros(8, device=device, dtype=torch.int32), "auto"),
        "a CPU tensor": (torch.zeros(8), "auto"),
    }
    texts = {}
    for name, (x, algo) in cases.items():
        try:
            sgl_comm.ops.custom_all_reduce_v2(x, group, algo)
            texts[name] = "no error"
        except sgl_comm.SglCommError as error:
            texts[name] = str(error)
    wrong = list(
        _differs(
            sgl_comm.ops.custom_all_reduce_v2(torch.ones(8, device=device), group).cpu(),
            torch.full((8,), float(ctx.world)),
            "the call after the refusals",
        )
    )
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
            calls.append(Call(label, values, [layout] * ctx.world, in_place, ctx.group.group_name, ctx.rank))
        return Batch(ctx, calls)

    def capture(static: Batch) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = static.issue()
        return graph, outs

    static = [batch(which, -1) for which in range(len(recipes))]
    for warm_up in static:
        warm_up.issue()
    _meet(ctx)
    graphs = [capture(one) for one in static]
    wrong = []
    for replay in range(replays):
        for which, (graph, outs) in enumerate(graphs):
            fresh = batch(which, replay)
            static[which].arena.copy_(fresh.arena)
            _meet(ctx)
            graph.replay()
            eager = torch.ops.sgl_comm.all_reduce(
                torch.full((9,), float(replay), device=ctx.device), ctx.group.group_name
            )
            _meet(ctx)
            wrong += fresh.failures(outs, static[which].arena)
            expected = torch.full((9,), float(replay * ctx.world))
            wrong += _differs(eager.cpu(), expected, f"the eager call after replay {replay} of graph {which}")
    return wrong


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where a test runs."""

    device: str
    world: int

    def run(self, fn: Callable[..., Any], *args: Any, deadline: float = 120.0) -> list[Any]:
        return run_ranks(fn, self.world, *args, device=self.device, deadline=deadline)

    def all_right(self, fn: Callable[..., list[str]], *args: Any, deadline: float = 120.0) -> None:
        """Runs a function that returns what is wrong, and fails with the first of it."""
        wrong = [
            f"rank {rank}: {text}"
            for rank, found in enumerate(self.run(fn, *args, deadline=deadline))
            for text in found
        ]
        assert not wrong, f"{len(wrong)} wrong, among them:\n" + "\n".join(wrong[:20])


def _ranks(device: str, worlds: Sequence[int]) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param(Ranks(device, world), id=f"{device}-{world}", marks=marks) for world in worlds]


@pytest.fixture(scope="module", params=[*_ranks("cpu", CPU_WORLDS), *_ranks("cuda", GPU_WORLDS)])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Every device and world; a module's, so that tests of one world follow each other and share its processes."""
    return request.param


@pytest.fixture(scope="module", params=_ranks("cuda", GPU_WORLDS))
def gpu_ranks(request: pytest.FixtureRequest) -> Ranks:
    return request.param


def test_every_dtype_size_and_layout(ranks: Ranks) -> None:
    ranks.all_right(matrix, SHAPES)


def test_awkward_values(ranks: Ranks) -> None:
    ranks.all_right(awkward)


def test_200_calls_of_mixed_sizes_on_interleaved_groups(ranks: Ranks) -> None:
    ranks.all_right(interleaved, 200)


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
        assert set(texts) == {"one_shot above max_size", "an unknown algorithm", "another dtype", "a CPU tensor"}, texts
        assert all("custom_all_reduce_v2" in text and "expected" in text for text in texts.values()), texts
        assert "5242880 bytes" in texts["one_shot above max_size"]
        assert "'two_shot'" in texts["an unknown algorithm"]
        assert "all_reduce takes every dtype" in texts["another dtype"]
        assert "sgl_comm::all_reduce serves" in texts["a CPU tensor"]


def test_v2_refuses_cpu_tensors_and_points_to_all_reduce() -> None:
    with pytest.raises(sgl_comm.SglCommError, match=r"custom_all_reduce_v2: got .*\[8\] on cpu; .*all_reduce serves"):
        sgl_comm.ops.custom_all_reduce_v2(torch.ones(8), "no group is asked for")


@pytest.mark.parametrize("instructions", ["scalar", "avx2"])
def test_every_instruction_set_gives_the_same_bits(instructions: str) -> None:
    shapes = [(7,), (1040,), (26, 40), (65536,)]
    with RankPool(3, env={"SGL_COMM_CPU_INSTRUCTIONS": instructions}) as pool:
        for fn, args in ((matrix, (shapes,)), (awkward, ())):
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
