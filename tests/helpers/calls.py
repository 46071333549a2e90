"""Calls of the collectives, each with what it must give, and the checks that all tests of them make."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import sgl_comm
from helpers.compare import Compared, differences, owners, row_major
from helpers.ranks import synchronize
from helpers.values import (
    DTYPES,
    awkward_values,
    layouts_of_ranks,
    name_of,
    random_bytes,
    random_values,
    signal_like_values,
)
from sgl_comm import reference, testing
from sgl_comm.testing import Layout, Placed, RankContext
from sgl_comm.work import Work


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

    has_in_place: ClassVar[bool] = False
    """Whether the op has an in-place form."""

    @classmethod
    def variants(cls, number: int) -> list[dict[str, Any]]:
        """With which further fields to make the ``number``-th call of several."""
        return [{}]

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

    def terms(self) -> list[Tensor]:
        """For an op whose result is a sum element by element: what each rank puts in."""
        return []

    def same_result(self, other: Call) -> bool:
        """Whether both must give the same, whatever else differs."""
        return (
            type(self) is type(other)
            and self.values is other.values
            and all(mine.overlaps == theirs.overlaps for mine, theirs in zip(self.layouts, other.layouts, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class AllReduce(Call):
    has_in_place = True

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

    def terms(self) -> list[Tensor]:
        return self.held()


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
    has_in_place = True

    async_op: bool = False

    @classmethod
    def variants(cls, number: int) -> list[dict[str, Any]]:
        return [{"async_op": False}, {"async_op": True}]

    def issue(self, x: Tensor) -> Tensor | None:
        call = sgl_comm.ops.cfg_all_reduce_ if self.in_place else sgl_comm.ops.cfg_all_reduce
        return ended(call(x, self.group, async_op=self.async_op))

    def expected(self) -> Tensor:
        return reference.all_reduce(self.held())

    def terms(self) -> list[Tensor]:
        return self.held()


@dataclasses.dataclass(frozen=True)
class CfgBroadcast(Call):
    exact = True
    has_in_place = True

    async_op: bool = False

    @classmethod
    def variants(cls, number: int) -> list[dict[str, Any]]:
        return [{"async_op": number % 2 == 0}]

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
        compared = []
        if out is not None and found is not None:
            compared.append(Compared("result", found, expected, call.exact, inputs=call.terms()))
            if out.stride() != row_major(out.shape):
                yield f"{call.name}, result: got strides {out.stride()}, expected row-major for {tuple(out.shape)}"
        if call.in_place:
            compared.append(Compared("in place", placed.tensor, expected, call.exact, inputs=call.terms()))
        else:
            compared.append(Compared("its input afterwards", placed.tensor, placed.values, call.exact))
        yield from (f"{call.name}, {text}" for text in differences(compared))
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


def run_calls(ctx: RankContext, calls: Sequence[Call], flush_denormal: bool = False) -> list[str]:
    """Makes the calls one after the other and returns what is wrong with them."""
    batch = Batch(ctx, calls)
    synchronize(ctx)
    try:
        if flush_denormal and not torch.set_flush_denormal(True):
            return []
        outs = batch.issue()
    finally:
        if flush_denormal:
            torch.set_flush_denormal(False)
    synchronize(ctx)
    return batch.failures(outs)


def calls_of_every_layout(
    ctx: RankContext, kind: type[Call], name: str, values: Sequence[Tensor], group: str = ""
) -> list[Call]:
    """Calls with these values in every layout: functional, in place where the op can, and the op's variants."""
    calls = []
    for in_place in (False, True) if kind.has_in_place else (False,):
        how = "in place" if in_place else "functional"
        for number, (names, layouts) in enumerate(layouts_of_ranks(values[0].shape, ctx.world, in_place)):
            for fields in kind.variants(number + in_place):
                label = name_of(name, names, how, *(field for field, given in fields.items() if given))
                in_group = group or ctx.group.group_name
                calls.append(kind(label, values, layouts, in_group, ctx.rank, in_place, **fields))
    return calls


def run_every_layout(
    ctx: RankContext,
    kind: type[Call],
    shapes: Iterable[Sequence[int]],
    dtypes: Iterable[torch.dtype],
    group: str = "",
) -> list[str]:
    """Random values of every shape and dtype, in every layout."""
    wrong = []
    for shape, dtype in itertools.product(shapes, dtypes):
        values = (random_bytes if kind.exact else random_values)(ctx.world, shape, dtype)
        wrong += run_calls(ctx, calls_of_every_layout(ctx, kind, name_of(dtype, shape), values, group))
    return wrong


def run_and_flushing(ctx: RankContext, calls: Sequence[Call]) -> list[str]:
    """The calls, and on the CPU once more while the callers flush subnormals to zero, which must change nothing."""
    wrong = run_calls(ctx, calls)
    if ctx.device.type == "cpu":
        wrong += [f"flush to zero, {text}" for text in run_calls(ctx, calls, flush_denormal=True)]
    return wrong


def run_awkward_values(ctx: RankContext, kind: type[Call]) -> list[str]:
    """Sums of ``awkward_values``, in every layout."""
    wrong = []
    for dtype in DTYPES:
        for what, values in awkward_values(ctx.world, dtype).items():
            divisible = len(values[0]) // ctx.world * ctx.world
            values = [x[:divisible] for x in values] if kind is ReduceScatter else values
            wrong += run_and_flushing(ctx, calls_of_every_layout(ctx, kind, name_of(dtype, what), values))
    return wrong


def run_signal_like_values(ctx: RankContext, kind: type[Call]) -> list[str]:
    """Moves ``signal_like_values``, another order of them on each rank."""
    calls = []
    for (what, x), layout in itertools.product(signal_like_values().items(), ("row_major", "offset")):
        every = [x.view(torch.uint8).roll(rank).view(x.dtype) for rank in range(ctx.world)]
        layouts = [testing.layouts(x.shape)[layout]] * ctx.world
        calls.append(kind(name_of(what, layout), every, layouts, ctx.group.group_name, ctx.rank))
    return run_and_flushing(ctx, calls)


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


def sum_of_ones(name: str, count: int = 5, device: torch.device | str = "cpu") -> list[float]:
    """The values of an all-reduce of ones: the world size alone, if it is right."""
    return sgl_comm.ops.all_reduce(torch.ones(count, device=device), name).unique().tolist()
