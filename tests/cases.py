"""What the tests of the collectives share: calls with what they must give, values, layouts of ranks, where they run."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from sgl_comm import reference, testing
from sgl_comm.backends import shm_all_reduce
from sgl_comm.testing import Layout, Placed, RankContext, run_ranks
from sgl_comm.work import Work

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the package sums by itself."""

EVERY_DTYPE = (
    *DTYPES,
    torch.float64,
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
)
"""What is moved, bit for bit."""

CPU_WORLDS, GPU_WORLDS = (1, 2, 3, 4, 5, 8), (2, 3, 4, 5, 6, 7, 8)

SLOT_BYTES = 256 << 10
"""How much a rank of the CPU passes to its peers in one step."""


ROW_SHAPES: tuple[tuple[int, ...], ...] = (
    *((0,), (0, 3), (4, 0)),
    *((1,), (1, 1)),
    (7,),
    *((8,), (2, 4)),
    *((1000,), (10, 100), (5, 10, 20)),
    *((26, 40), (2, 4, 10, 13)),
)
"""Shapes of which every layout is tried, for ops that join or divide rows."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, as every rank of its group knows it: what each rank puts in, in which layout, in rank order."""

    name: str
    values: Sequence[Tensor]
    layouts: Sequence[Layout]
    group: str
    rank: int
    in_place: bool = False

    exact: ClassVar[bool] = False
    """Whether NaN must keep its payload."""

    def issue(self, x: Tensor) -> Tensor | None:
        raise NotImplementedError

    def expected(self) -> Tensor:
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """Every rank's input, in rank order: what its layout makes of its values."""
        return [
            values[:1].expand(values.shape) if layout.overlaps else values
            for layout, values in zip(self.layouts, self.values, strict=True)
        ]

    def same_result(self, other: Call) -> bool:
        """Whether both must give the same, whatever else differs."""
        return (
            type(self) is type(other)
            and self.values is other.values
            and all(mine.overlaps == theirs.overlaps for mine, theirs in zip(self.layouts, other.layouts, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class AllReduce(Call):
    algo: str = ""
    """For ``custom_all_reduce_v2``; empty for the front door."""

    def issue(self, x: Tensor) -> Tensor | None:
        if self.algo:
            return torch.ops.sgl_comm.custom_all_reduce_v2(x, self.group, self.algo)
        if self.in_place:
            return torch.ops.sgl_comm.all_reduce_(x, self.group)
        return torch.ops.sgl_comm.all_reduce(x, self.group)

    def expected(self) -> Tensor:
        return reference.all_reduce(self.held())


@dataclasses.dataclass(frozen=True)
class ReduceScatter(Call):
    def issue(self, x: Tensor) -> Tensor:
        return torch.ops.sgl_comm.reduce_scatter(x, self.group)

    def expected(self) -> Tensor:
        return reference.reduce_scatter(self.held(), self.rank)


@dataclasses.dataclass(frozen=True)
class AllGather(Call):
    exact = True

    def issue(self, x: Tensor) -> Tensor:
        return torch.ops.sgl_comm.all_gather(x, self.group)

    def expected(self) -> Tensor:
        return reference.all_gather(self.held())


@dataclasses.dataclass(frozen=True)
class CfgAllReduce(Call):
    async_op: bool = False

    def issue(self, x: Tensor) -> Tensor | None:
        call = sgl_comm.ops.cfg_all_reduce_ if self.in_place else sgl_comm.ops.cfg_all_reduce
        return ended(call(x, self.group, async_op=self.async_op))

    def expected(self) -> Tensor:
        return reference.all_reduce(self.held())


@dataclasses.dataclass(frozen=True)
class CfgBroadcast(Call):
    async_op: bool = False

    exact = True

    @property
    def src(self) -> int:
        return zlib.crc32(self.name.encode()) % len(self.values)

    def issue(self, x: Tensor) -> Tensor | None:
        call = sgl_comm.ops.cfg_broadcast_ if self.in_place else sgl_comm.ops.cfg_broadcast
        return ended(call(x, self.src, self.group, async_op=self.async_op))

    def expected(self) -> Tensor:
        return reference.cfg_broadcast(self.held(), self.src)

    def same_result(self, other: Call) -> bool:
        return super().same_result(other) and isinstance(other, CfgBroadcast) and self.src == other.src


def ended(result: Tensor | Work | None) -> Tensor | None:
    """The result of a call; of one that goes on beside the caller, once that has waited."""
    return result.wait() if isinstance(result, Work) else result


class Batch:
    """Calls whose inputs lie in one arena on the device, so that a GPU is asked for results once and not a call."""

    def __init__(self, ctx: RankContext, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.placed: list[Placed] = [call.layouts[call.rank](call.values[call.rank]) for call in calls]
        self.expected: list[Tensor] = []
        for number, call in enumerate(calls):
            known = next((i for i in range(number) if calls[i].same_result(call)), None)
            self.expected.append(call.expected() if known is None else self.expected[known])
        self.sizes = [placed.buffer.numel() for placed in self.placed]
        self.arena = torch.cat([placed.buffer for placed in self.placed]).to(ctx.device)
        self.inputs = [
            on_buffer(piece, placed) for piece, placed in zip(self.arena.split(self.sizes), self.placed, strict=True)
        ]

    def issue(self) -> list[Tensor | None]:
        return [call.issue(x) for call, x in zip(self.calls, self.inputs, strict=True)]

    def failures(self, outs: Sequence[Tensor | None], arena: Tensor | None = None) -> list[str]:
        """What is wrong with the results, and with the memory of the inputs; overwrites the results."""
        arena = self.arena if arena is None else arena
        fresh = [out for out in outs if out is not None]
        found = download(fresh)
        wrong = [
            f"{call.name}: the result shares memory with an input or with another result"
            for call, out in zip(self.calls, outs, strict=True)
            if out is not None and out.numel() > 0 and owners(out, [arena, *fresh]) != 1
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
            yield from differs(found, expected, f"{call.name}, result", call.exact)
            if out.stride() != torch.empty(out.shape, device="meta").stride():
                yield f"{call.name}: strides of the result: got {out.stride()}, expected row-major for {out.shape}"
        if call.in_place:
            yield from differs(placed.tensor, expected, f"{call.name}, in place", call.exact)
        else:
            yield from differs(placed.tensor, placed.values, f"{call.name}, its input afterwards", call.exact)
        overwritten = placed.overwritten()
        if overwritten:
            yield f"{call.name}: bytes around the tensor were overwritten, at {overwritten}"


def on_buffer(piece: Tensor, placed: Placed) -> Tensor:
    flat = piece.view(placed.tensor.dtype)
    like = placed.tensor
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + like.storage_offset())


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Row-major copies on the CPU, fetched at once."""
    if not tensors:
        return []
    flat = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors]).cpu()
    pieces = flat.split([x.numel() * x.element_size() for x in tensors])
    return [piece.clone().view(x.dtype).view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def owners(out: Tensor, others: Sequence[Tensor]) -> int:
    storage = out.untyped_storage().data_ptr()
    return sum(other.untyped_storage().data_ptr() == storage for other in others)


def differs(actual: Tensor, expected: Tensor, label: str, exact: bool = False) -> Iterator[str]:
    """What is wrong with a tensor; `exact` also with the payload of a NaN."""
    if exact and actual.dtype == expected.dtype and actual.shape == expected.shape:
        flat = (x.clone(memory_format=torch.contiguous_format).view(-1) for x in (actual, expected))
        actual, expected = (x.view(torch.uint8) for x in flat)
        label += ", as bytes"
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(actual.element_size())
    same_kind = actual.dtype == expected.dtype and actual.device == expected.device
    if words is not None and same_kind and torch.equal(actual.view(words), expected.view(words)):
        return  # the same bits: nothing to look into
    try:
        testing.assert_bits_equal(actual, expected, label)
    except AssertionError as error:
        yield str(error)


def meet(ctx: RankContext) -> None:
    """Waits until no rank's kernels are on the GPU: a copy would take turns with the waiting ones."""
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
        dist.barrier(ctx.group)


def run_calls(ctx: RankContext, calls: Sequence[Call], flush_denormal: bool = False) -> list[str]:
    """Makes the calls one after the other and returns what is wrong with them."""
    batch = Batch(ctx, calls)
    meet(ctx)
    try:
        if flush_denormal and not torch.set_flush_denormal(True):
            return []
        outs = batch.issue()
    finally:
        if flush_denormal:
            torch.set_flush_denormal(False)
    meet(ctx)
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


def random_bytes(world: int, shape: Sequence[int], dtype: torch.dtype, *seed: object) -> list[Tensor]:
    """Every rank's values: any bits at all, NaN of every payload among them; for bool, zeros and ones."""
    size = torch.empty(tuple(shape), device="meta").numel() * dtype.itemsize
    random_bits = generator(world, shape, dtype, *seed)

    def one() -> Tensor:
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None, generator=random_bits)
        some = words.view(torch.uint8)[:size]
        return some & 1 if dtype == torch.bool else some

    return [one().view(dtype).view(tuple(shape)) for _ in range(world)]


def layouts_of_ranks(shape: Sequence[int], world: int, in_place: bool = False) -> Iterator[tuple[str, list[Layout]]]:
    """Every layout on all ranks alike; then layouts that differ between the ranks. Each with its name."""
    usable = [layout for layout in testing.layouts(shape).values() if not (in_place and layout.overlaps)]
    mixed = [usable[(rank + in_place) % len(usable)] for rank in range(world)]
    for ranks in [*([layout] * world for layout in usable), mixed]:
        yield "+".join(dict.fromkeys(layout.name for layout in ranks)), ranks


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


@contextmanager
def group_without_shared_memory(ctx: RankContext) -> Iterator[str]:
    """The name of a group of all ranks that its own backend must serve, on every device."""
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm_all_reduce, "why_not_world_size", lambda world: "the test wants it so")
        comm = sgl_comm.init(group, "cpu")
    yield group.group_name
    meet(ctx)
    comm.close()
    dist.destroy_process_group(group)


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


def ranks_on(device: str, worlds: Sequence[int]) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param(Ranks(device, world), id=f"{device}-{world}", marks=marks) for world in worlds]


def interleaved(ctx: RankContext, kinds: Sequence[type[Call]], count: int, pause: float = 0.0) -> list[str]:
    """Calls of several kinds, sizes, dtypes and layouts on one communicator; with a pause, one rank late each time."""
    calls: list[Call] = []
    for number in range(count):
        chance = random.Random(number)
        kind, dtype = chance.choice(kinds), chance.choice(DTYPES)
        rows = chance.choice((0, 1, 2, 7, 100, 333, 2000, 9001)) * (ctx.world if kind is ReduceScatter else 1)
        shape = (rows, chance.choice((1, 4, 9)))
        layouts = [chance.choice(list(testing.layouts(shape).values())) for _ in range(ctx.world)]
        values = random_values(ctx.world, shape, dtype, "call", number)
        label = name_of("call", number, kind.__name__, dtype, shape)
        calls.append(kind(label, values, layouts, ctx.group.group_name, ctx.rank))
    if not pause:
        return run_calls(ctx, calls)
    wrong = []
    for number, call in enumerate(calls):
        if ctx.rank == number % ctx.world:
            time.sleep(pause)  # the others wait until they sleep
        wrong += run_calls(ctx, [call])
    return wrong


def error_text(call: Callable[[], object]) -> str:
    """The text of a call's ``SglCommError``, or an empty one."""
    try:
        call()
    except sgl_comm.SglCommError as error:
        return str(error)
    return ""


def error_of(call: Callable[[], object]) -> str:
    """The type and text of any error of a call, or that there was none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sum_of_ones(name: str, count: int = 5) -> list[float]:
    """The values of an all-reduce of ones: the world size alone, if it is right."""
    return torch.ops.sgl_comm.all_reduce(torch.ones(count), name).unique().tolist()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """``torch.cuda.graph`` during which no garbage is collected: the end of an older graph would end the capture."""
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream):
            yield
    finally:
        gc.enable()
