"""reduce_scatter between real processes: each rank's rows of the fp32 rank-order sum, bit for bit."""

from __future__ import annotations

import pytest
import torch

import sgl_comm
from helpers.calls import (
    AllReduce,
    ReduceScatter,
    interleaved,
    run_awkward_values,
    run_calls,
    run_every_layout,
    sum_of_ones,
)
from helpers.compare import assert_none_wrong, difference
from helpers.errors import error_text
from helpers.ranks import SLOT_BYTES, Ranks, group_without_shared_memory
from helpers.refusals import REFUSALS, assert_every_rank_reports, assert_refused, refused_calls
from helpers.values import DTYPES, ROW_SHAPES, generator, name_of, random_values
from sgl_comm import testing
from sgl_comm.testing import RankContext, RankPool


def every_layout(ctx: RankContext) -> list[str]:
    shapes = [(ctx.world * rows, *rest) for rows, *rest in ROW_SHAPES]  # so many rows are a rank's share
    return run_every_layout(ctx, ReduceScatter, shapes, DTYPES)


def around_the_chunk(ctx: RankContext) -> list[str]:
    """Sizes at which the number of steps changes, and a large one."""
    wrong = []
    part_bytes = SLOT_BYTES // max(1, ctx.world - 1) // 64 * 64
    for dtype in DTYPES:
        part = part_bytes // dtype.itemsize
        for share in (part - 1, part, part + 1, 2 * part, 3 * part + 5, (2**20 + 3) // ctx.world):
            shape = (ctx.world * share,)
            values = random_values(ctx.world, shape, dtype)
            layouts = [testing.layouts(shape)["offset"]] * ctx.world
            call = ReduceScatter(name_of(dtype, shape), values, layouts, ctx.group.group_name, ctx.rank)
            wrong += run_calls(ctx, [call])
    return wrong


def halves_of_all_reduce(ctx: RankContext) -> list[str]:
    """all_gather of reduce_scatter has the bits of all_reduce."""
    wrong = []
    group = ctx.group.group_name
    for dtype in DTYPES:
        for rows in (1, 5, 4096):
            shape = (ctx.world * rows, 33)
            x = random_values(ctx.world, shape, dtype, "halves")[ctx.rank].to(ctx.device)
            share = torch.ops.sgl_comm.reduce_scatter(x, group)
            whole = torch.ops.sgl_comm.all_reduce(x, group)
            wrong += difference(torch.ops.sgl_comm.all_gather(share, group), whole, name_of(dtype, shape), exact=True)
    return wrong


def small_numbers(ctx: RankContext, group: str, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Values that any order sums alike, in every layout."""
    wrong = []
    for dtype in dtypes:
        for rows, *rest in ((0,), (3, 2), (2, 3, 4, 5)):
            shape = (ctx.world * rows, *rest)
            every = torch.randint(0, 4, (ctx.world, *shape), generator=generator(dtype, shape)).to(dtype)
            total = every.sum(0, dtype=dtype) if every.numel() else every[0]
            expected = total[ctx.rank * rows : (ctx.rank + 1) * rows]
            for layout in testing.layouts(shape).values():
                if layout.overlaps or (ctx.device.type == "cuda" and layout.name not in ("row_major", "transposed")):
                    continue
                label = name_of("fallback", dtype, shape, layout.name)
                placed = layout(every[ctx.rank].to(ctx.device))
                out = torch.ops.sgl_comm.reduce_scatter(placed.tensor, group)
                wrong += difference(out.cpu(), expected, label)
                wrong += difference(placed.tensor, placed.values, f"{label}, its input afterwards")
                if not out.is_contiguous():
                    wrong.append(f"{label}: the result is not row-major")
    return wrong


OTHER_DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.float64)


def other_dtypes(ctx: RankContext) -> list[str]:
    return small_numbers(ctx, ctx.group.group_name, OTHER_DTYPES)


def by_the_own_backend(ctx: RankContext) -> list[str]:
    with group_without_shared_memory(ctx) as group:
        return small_numbers(ctx, group, (*DTYPES, *OTHER_DTYPES))


def refused(ctx: RankContext) -> dict[str, str]:
    return refused_calls(ctx, sgl_comm.ops.reduce_scatter)


def refused_for_a_dtype(ctx: RankContext) -> str:
    """A dtype that gloo does not sum: an error with its cause on every rank, and no harm."""
    x, group = torch.ones(ctx.world, dtype=torch.int16), ctx.group.group_name
    text = error_text(lambda: sgl_comm.ops.reduce_scatter(x, group))
    assert sum_of_ones(group) == [ctx.world]
    return text


def test_every_dtype_size_and_layout(ranks: Ranks) -> None:
    ranks.all_right(every_layout)


def test_sizes_around_the_chunk_and_a_large_one(ranks: Ranks) -> None:
    ranks.all_right(around_the_chunk)


def test_awkward_values(ranks: Ranks) -> None:
    ranks.all_right(run_awkward_values, ReduceScatter)


def test_the_two_halves_are_an_all_reduce(ranks: Ranks) -> None:
    ranks.all_right(halves_of_all_reduce)


def test_other_dtypes_take_the_fallback(ranks: Ranks) -> None:
    ranks.all_right(other_dtypes)


def test_the_own_backend_serves_where_shared_memory_does_not(ranks: Ranks) -> None:
    ranks.all_right(by_the_own_backend)


def test_an_error_of_the_own_backend_is_told() -> None:
    for text in Ranks("cpu", 2).run(refused_for_a_dtype):
        assert text.startswith("sgl_comm::reduce_scatter: the fallback to the own backend of group '0' (NCCL or gloo)")
        assert "failed on int16[2] on cpu: RuntimeError: " in text


def test_bad_arguments_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    results = ranks.run(refused)
    expected = dict(REFUSALS)
    if ranks.world > 1:
        expected["rows"] = f"; expected the size of dim 0 to be a multiple of {ranks.world}, the number of ranks"
        assert f"got float32[{ranks.world + 1}, 2] on c" in results[0]["rows"]
    assert_refused("reduce_scatter", ranks.world, results, expected)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("op", "count", "dtype", "words"),
    [
        ("reduce_scatter", 1004, torch.float32, "reduce_scatter of 1004 float32"),
        ("reduce_scatter", 0, torch.float32, "reduce_scatter of 0 float32"),
        ("reduce_scatter", 500_000, torch.float32, "reduce_scatter of 500000 float32"),
        ("reduce_scatter", 1000, torch.bfloat16, "reduce_scatter of 1000 bfloat16"),
        ("all_reduce", 1000, torch.float32, "all_reduce of 1000 float32"),
        ("all_reduce", 500_000, torch.float16, "all_reduce of 500000 float16"),
        ("all_gather", 1000, torch.float32, "all_gather of 1000 float32"),
        ("all_gather", 1000, torch.bool, "all_gather of 1000 bool"),
    ],
    ids=str,
)
def test_ranks_that_differ_get_an_error_on_every_rank(
    world: int, op: str, count: int, dtype: torch.dtype, words: str
) -> None:
    assert_every_rank_reports("reduce_scatter", world, op, count, dtype, words)


def test_200_calls_among_others_on_one_communicator(ranks: Ranks) -> None:
    ranks.all_right(interleaved, [ReduceScatter, AllReduce], 200)


@pytest.mark.parametrize("instructions", ["scalar", "avx2"])
def test_every_instruction_set_gives_the_same_bits(instructions: str) -> None:
    with RankPool(3, env={"SGLCOMM_CPU_INSTRUCTIONS": instructions}) as pool:
        assert_none_wrong(pool.run(every_layout, deadline=60))
        assert_none_wrong(pool.run(run_awkward_values, ReduceScatter, deadline=60))
