"""For tests of many calls: every rank's values as long rows of which a call takes a window, and what it must give."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

import sgl_comm
from sgl_comm import reference, testing
from sgl_comm.backends import open_groups
from sgl_comm.testing import RankPool

V2_ALGORITHMS = ("auto", "one_shot", "two_shot", "one_shot_ring", "two_shot_ring")
V2_OPS = (*V2_ALGORITHMS, "reduce_scatter", "all_gather", "broadcast", "norm")
OPS = ("v1", *V2_OPS)
"""Names of calls: V1, V2 by each algorithm, V2's halves, a broadcast, and the fused norm, of which the new residual is
looked at."""

SLACK = 1 << 15
"""Elements that a row is longer than the longest window: where windows may start."""

_PERIOD = 300_007
"""Elements; a prime, so that no two places that a kernel could confuse hold the same."""
_WORDS = {2: torch.int16, 4: torch.int32}


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
    them (``testing.special_values``), in pairs at even places.
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
    places = torch.arange(0, _PERIOD - 1, 62)
    chosen = pairs[(torch.arange(len(places)) * (rank + 1) + rank) % len(pairs)]
    values[places], values[places + 1] = chosen[:, 0], chosen[:, 1]
    return values


def as_words(x: Tensor) -> Tensor:
    """The tensor's bits, for a comparison that tells one NaN from another."""
    return x.view(_WORDS[x.element_size()])


def differences(compared: Iterable[tuple[str, Tensor, Tensor]], most: int = 5) -> list[str]:
    """What is wrong with (label, got, expected): where they are, with one look at the device; at most so many."""
    wrong, flags, suspects = [], [], []
    for label, got, expected in compared:
        if got.shape != expected.shape or got.dtype != expected.dtype or not got.is_contiguous():
            wrong.append(f"{label}: got {got.dtype} {tuple(got.shape)} of strides {got.stride()},"
                         f" expected row-major {expected.dtype} {tuple(expected.shape)}")  # fmt: skip
            continue
        suspects.append((label, got, expected))
        flags.append(testing.wrong_elements(got, expected).any())
    found = torch.stack(flags).tolist() if flags else []
    failed = [suspect for suspect, flag in zip(suspects, found, strict=True) if flag]
    for label, got, expected in failed[:most]:
        try:
            testing.assert_bits_equal(got.cpu(), expected.cpu(), label)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong + ([f"and {len(failed) - most} more"] if len(failed) > most else [])


def compared(op: str, label: str, got: Tensor, expected: Tensor) -> tuple[str, Tensor, Tensor]:
    """For ``differences``: bit for bit where nothing is summed."""
    return (label, as_words(got), as_words(expected)) if op in ("all_gather", "broadcast") else (label, got, expected)


class Pools:
    """Pools of ranks on GPUs, by world; each made when first asked for, or after a failure.

    Args:
        env: variables of the ranks, on top of this process's.
        make_comm: whether each rank gets a communicator.
    """

    def __init__(self, env: Mapping[str, str | None], make_comm: bool = False) -> None:
        self._env, self._make_comm = env, make_comm
        self._pools: dict[int, RankPool] = {}

    def of(self, world: int) -> RankPool:
        if world not in self._pools or not self._pools[world].usable:
            self._pools[world] = RankPool(world, "cuda", env=self._env, make_comm=self._make_comm)
        return self._pools[world]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def simulating_pools() -> Pools:
    """For pools of one process that holds simulated ranks: the driver gives each of their streams a queue of its own,
    so that no rank's kernels wait behind another's; and a rank that is missed is so for seconds."""
    return Pools({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "SGLCOMM_TIMEOUT": "20"})


def assert_none_wrong(results: Sequence[list[str]]) -> None:
    """For the results of cases that return what is wrong, rank by rank."""
    wrong = [f"rank {rank}: {text}" for rank, found in enumerate(results) for text in found]
    assert not wrong, f"{len(wrong)} wrong, among them:\n" + "\n".join(wrong[:20])
