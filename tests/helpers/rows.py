"""For tests of many calls: every rank's values as long rows of which a call takes a window, and what it must give."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

import sgl_comm
from helpers.compare import Compared, row_major
from sgl_comm import reference, testing
from sgl_comm.backends import open_groups

V2_ALGORITHMS = ("auto", "one_shot", "two_shot", "one_shot_ring", "two_shot_ring")
V2_OPS = (*V2_ALGORITHMS, "reduce_scatter", "all_gather", "broadcast", "norm")
OPS = ("v1", *V2_OPS)
"""Names of calls: V1, V2 by each algorithm, V2's halves, a broadcast, and the fused norm, of which the new residual is
looked at."""

SLACK = 1 << 15
"""Elements that a row is longer than the longest window: where windows may start."""

_PERIOD = 300_007
"""Elements; a prime, so that no two elements that a kernel could confuse are the same."""


def call(op: str, x: Tensor, group_name: str) -> Tensor:
    """One call by its name in ``OPS``."""
    if op == "v1":
        return sgl_comm.ops.custom_all_reduce_v1(x, group_name)
    if op == "reduce_scatter":
        return sgl_comm.ops.reduce_scatter(x, group_name)
    if op == "all_gather":
        return sgl_comm.ops.all_gather(x, group_name)
    if op == "broadcast":
        return sgl_comm.ops.cfg_broadcast(
            x, _source(x.numel(), open_groups.world_size("cfg_broadcast", group_name)), group_name
        )
    if op == "norm":
        rows = x.view(-1, _row_length(x.numel()))
        norm = sgl_comm.ops.tp_attn_all_reduce_and_layernorm
        return norm(rows, rows, rows[0], None, 1e-6, group_name=group_name)[1].view(-1)
    return sgl_comm.ops.custom_all_reduce_v2(x, group_name, op)


def _source(count: int, world: int) -> int:
    """Of a broadcast of so many elements."""
    return count % world


def _row_length(count: int) -> int:
    """Of rows that have so many elements together: one that can be fused, else several that can be, else one."""
    length = count if count <= 16384 else math.gcd(count, 4096)
    return length if length >= 8 else count


def input_count(op: str, count: int, world: int) -> int:
    """How many elements a rank puts in for a message of about ``count``: one that the op can take."""
    if op == "reduce_scatter":
        return -(-count // world) * world
    return max(1, count // world) if op == "all_gather" else count


def result_count(op: str, count: int, world: int) -> int:
    """How many elements a call gives for ``count`` put in."""
    return {"reduce_scatter": count // world, "all_gather": count * world}.get(op, count)


class Rows:
    """Every rank's values of one dtype, and their sum by the oracle on the CPU, as rows on a device.

    Random numbers of such different magnitudes that a sum depends on the order and on fp32, with awkward ones between
    them (``testing.special_values``), in pairs at even positions.
    """

    def __init__(self, world: int, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        self._length = longest + SLACK
        self._device = device
        values = [_values(world, rank, dtype) for rank in range(world)]
        self._rows = [self._stretched(each) for each in values]
        self._sum = self._stretched(reference.all_reduce(values))
        self._shifted: dict[int, Tensor] = {}

    def _stretched(self, values: Tensor, shift: int = 0) -> Tensor:
        row = torch.empty(self._length + shift, dtype=values.dtype, device=self._device)[shift:]
        row.copy_(values.to(self._device).repeat(-(-self._length // _PERIOD))[: self._length])
        return row

    def window(self, rank: int, start: int, count: int, shifted: bool = False) -> Tensor:
        """A rank's values as a view. Shifted, the rows of odd ranks begin one element past an aligned address."""
        row = self._rows[rank]
        if shifted and rank % 2 == 1:
            if rank not in self._shifted:
                self._shifted[rank] = torch.empty(self._length + 1, dtype=row.dtype, device=self._device)[1:].copy_(row)
            row = self._shifted[rank]
        return row[start : start + count]

    def expected(self, op: str, rank: int, start: int, count: int) -> Tensor:
        """What ``rank`` gets of a call with ``window(r, start, count)`` on each rank r."""
        if op == "all_gather":
            return reference.all_gather([self.window(r, start, count) for r in range(len(self._rows))])
        if op == "broadcast":
            return self.window(_source(count, len(self._rows)), start, count)
        if op == "reduce_scatter":
            share = count // len(self._rows)
            return self._sum[start + rank * share : start + (rank + 1) * share]
        if op == "norm":
            terms = self._sum[start : start + count], self.window(rank, start, count)
            return (terms[0].float() + terms[1].float()).to(terms[0].dtype)
        return self._sum[start : start + count]


def _values(world: int, rank: int, dtype: torch.dtype) -> Tensor:
    chance = torch.Generator().manual_seed(zlib.crc32(f"{world} {rank} {dtype}".encode()))
    exponents = torch.randint(-10, 11, (_PERIOD,), generator=chance)
    values = torch.ldexp(torch.randn(_PERIOD, generator=chance), exponents).to(dtype)
    pairs = testing.special_values(dtype).view(-1, 2)
    positions = torch.arange(0, _PERIOD - 1, 62)
    chosen = pairs[(torch.arange(len(positions)) * (rank + 1) + rank) % len(pairs)]
    values[positions], values[positions + 1] = chosen[:, 0], chosen[:, 1]
    return values


def compared(op: str, label: str, got: Tensor, expected: Tensor) -> Compared:
    """For ``differences``: row-major, and with the payload of every NaN where nothing is summed."""
    return Compared(label, got, expected, op in ("all_gather", "broadcast"), row_major(expected.shape))
