"""V1, V2 by every algorithm, reduce_scatter and all_gather between processes: the bits of the oracle, and so alike,
at sizes around every threshold, eager and captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.compare import Compared, differences
from helpers.ranks import Ranks, capturing, ranks_on, synchronize
from helpers.rows import OPS, SLACK, Rows, call, compared, input_count
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.thresholds import thresholds_for
from sgl_comm.testing import RankContext

pytestmark = pytest.mark.gpu

KIB, MIB = 1 << 10, 1 << 20
REPLAYS = 3

ROW_PACKS, ROW_DATA_PACKS, PACK_BYTES = 34, 32, 16
"""What a row of an all-gather takes of the workspace, and how much of it is the message's."""
MOST_PACKS_TO_EMPTY = 0x3FFF * 4
"""How many packs an all-gather that is no ring may leave behind."""


@dataclass(frozen=True)
class Case:
    """A call with so many elements put in by each rank."""

    op: str
    dtype: torch.dtype
    count: int

    def __str__(self) -> str:
        return f"{self.op} of {self.count} {self.dtype}"


def cases_of(ops: Sequence[str], dtype: torch.dtype, counts: Sequence[int], world: int) -> list[Case]:
    """Each op with each size of message."""
    return [Case(op, dtype, input_count(op, count, world)) for count in counts for op in ops]


def around(num_bytes: int, dtype: torch.dtype) -> list[int]:
    """The number of elements that fill so many bytes, one less, and one more."""
    limit = num_bytes // dtype.itemsize
    return [limit - 1, limit, limit + 1]


def up_to_a_mebibyte(world: int, one_shot_bytes: int) -> list[Case]:
    """From one element to 1 MiB: packs that are not full, odd counts, and where the choice or the launch changes."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        size, pack = dtype.itemsize, 16 // dtype.itemsize
        counts = [1, pack + 1, 1001, MIB // size - 1]
        if dtype != torch.float16 and one_shot_bytes < MIB:
            counts += around(one_shot_bytes, dtype)
        if dtype == torch.bfloat16:
            counts += [3, pack - 1, pack, *(edge * KIB // size + 1 for edge in (1, 16, 32, 128, 256)), MIB // size]
        cases += cases_of(OPS, dtype, counts, world)
    return cases


def around_what_fits(world: int, slot: int, dtype: torch.dtype) -> list[Case]:
    """Sizes around the largest that each algorithm passes at once through a workspace of this ``max_size``.

    In two-shot half a buffer is for shards and half for their sums; in reduce_scatter all of it is for shards.
    """
    once = around(slot, dtype)
    twice = around(world * slot // 2, dtype)
    rows = min(slot // (ROW_PACKS * PACK_BYTES), MOST_PACKS_TO_EMPTY // (ROW_PACKS * (world - 1)))
    cases = cases_of(["one_shot", "auto", "one_shot_ring", "v1"], dtype, [1, *once], world)
    cases += cases_of(["two_shot", "auto", "two_shot_ring"], dtype, [1, *twice], world)
    cases += [Case("reduce_scatter", dtype, world * share) for share in once]
    cases += [Case("all_gather", dtype, count) for count in around(rows * ROW_DATA_PACKS * PACK_BYTES, dtype)]
    cases += [Case("v1", dtype, 2 * slot // dtype.itemsize + 1)]
    return cases


def large(world: int) -> list[Case]:
    """4 MiB and an odd number more by everything; 32 MiB, where an algorithm and its ring are the same."""
    cases = cases_of(OPS, torch.bfloat16, [4 * MIB // 2 + 13], world)
    rings = ("one_shot_ring", "two_shot_ring")
    return cases + cases_of([op for op in OPS if op not in rings], torch.bfloat16, [32 * MIB // 2], world)


class Batch:
    """The inputs of the cases, at fixed addresses, and what each pass puts into them.

    One rank in three, another one for each case, has its input one element past an aligned address.
    """

    def __init__(self, ctx: RankContext, cases: Sequence[Case]) -> None:
        self._ctx, self._cases = ctx, cases
        longest = {case.dtype: max(each.count for each in cases if each.dtype == case.dtype) for case in cases}
        self._rows = {dtype: Rows(ctx.world, dtype, ctx.device, count) for dtype, count in longest.items()}
        self.inputs: list[Tensor] = []
        for number, case in enumerate(cases):
            unaligned = (number + ctx.rank) % 3 == 0
            buffer = torch.empty(case.count + unaligned, dtype=case.dtype, device=ctx.device)
            self.inputs.append(buffer[int(unaligned) :])

    def _start(self, number: int, turn: int) -> int:
        return 2 * ((37 * number + 1009 * turn) % (SLACK // 2))

    def _window(self, number: int, turn: int) -> Tensor:
        case = self._cases[number]
        return self._rows[case.dtype].window(self._ctx.rank, self._start(number, turn), case.count)

    def fill(self, turn: int) -> None:
        """Puts the numbers of this pass into the inputs, once all ranks have finished the one before."""
        for number, x in enumerate(self.inputs):
            x.copy_(self._window(number, turn))
        synchronize(self._ctx)

    def issue(self, group_name: str) -> list[Tensor]:
        return [call(case.op, x, group_name) for case, x in zip(self._cases, self.inputs, strict=True)]

    def wrong(self, outs: Sequence[Tensor], turn: int, label: str) -> list[str]:
        """What is wrong with the results, and with the inputs afterwards; waits for all ranks first."""
        synchronize(self._ctx)
        results = []
        for number, (case, out) in enumerate(zip(self._cases, outs, strict=True)):
            start, rank = self._start(number, turn), self._ctx.rank
            expected = self._rows[case.dtype].expected(case.op, rank, start, case.count)
            results.append(compared(case.op, f"{case}, {label}", out, expected))
        kept = [
            Compared(f"{case}, {label}: its input afterwards", x, self._window(number, turn), exact=True)
            for number, (case, x) in enumerate(zip(self._cases, self.inputs, strict=True))
        ]
        return differences(results) + differences(kept)


def run_cases(
    ctx: RankContext, cases: Sequence[Case], group_name: str, capture: Callable[[], AbstractContextManager[None]]
) -> list[str]:
    """All cases one after the other, eager; then in one graph, replayed with other numbers each time."""
    batch = Batch(ctx, cases)
    batch.fill(0)
    wrong = batch.wrong(batch.issue(group_name), 0, "eager")
    graph = torch.cuda.CUDAGraph()
    with capture(), capturing(graph):
        outs = batch.issue(group_name)
    for turn in range(1, REPLAYS + 1):
        batch.fill(turn)
        graph.replay()
        wrong += batch.wrong(outs, turn, f"replay {turn}")
    return wrong


def through_the_communicator(ctx: RankContext, which: str) -> list[str]:
    assert ctx.comm is not None
    assert ctx.comm.backend == "v2"
    one_shot_bytes = thresholds_for(ctx.world, torch.cuda.get_device_capability(ctx.device)).one_shot_bytes
    cases = large(ctx.world) if which == "large" else up_to_a_mebibyte(ctx.world, one_shot_bytes)
    wrong = run_cases(ctx, cases, ctx.comm.group_name, ctx.comm.capture)
    ctx.comm.check()
    torch.cuda.empty_cache()
    return wrong


def through_a_small_workspace(ctx: RankContext, slot: int, dtype: torch.dtype) -> list[str]:
    group = dist.new_group(list(range(ctx.world)))
    v2 = CustomAllReduceV2(group, ctx.device, max_size=slot)
    v1 = CustomAllReduceV1(group, ctx.device, max_size=slot)
    assert (v2.reason, v1.reason) == ("", "")
    cases = around_what_fits(ctx.world, slot, dtype)
    if slot >= 256 * KIB:
        ops = ("one_shot_ring", "two_shot_ring", "reduce_scatter", "all_gather", "v1")
        cases += cases_of(ops, dtype, [MIB // dtype.itemsize - 1], ctx.world)
    wrong = run_cases(ctx, cases, group.group_name, v1.capture)
    wrong += [text for text in (v1.fault(), v2.fault()) if text]
    synchronize(ctx)
    v1.close()
    v2.close()
    torch.cuda.empty_cache()
    dist.destroy_process_group(group)
    return wrong


def test_up_to_a_mebibyte(gpu_ranks: Ranks) -> None:
    gpu_ranks.all_right(through_the_communicator, "small", deadline=150)


@pytest.mark.parametrize(("slot", "dtype"), [(64 * KIB, torch.bfloat16), (256 * KIB, torch.float32)], ids=str)
def test_around_what_fits_a_small_workspace(gpu_ranks: Ranks, slot: int, dtype: torch.dtype) -> None:
    gpu_ranks.all_right(through_a_small_workspace, slot, dtype, deadline=150)


@pytest.mark.parametrize("gpu_ranks", ranks_on("cuda", (2, 3, 8)), scope="module")
def test_4_and_32_mebibytes(gpu_ranks: Ranks) -> None:
    gpu_ranks.all_right(through_the_communicator, "large", deadline=240)
