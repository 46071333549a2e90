"""all_gather between real processes: every rank's rows in rank order, bit for bit, for every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import sgl_comm
from helpers.calls import (
    AllGather,
    AllReduce,
    calls_of_every_layout,
    interleaved,
    run_calls,
    run_every_layout,
    run_signal_like_values,
)
from helpers.compare import difference
from helpers.errors import error_text
from helpers.ranks import SLOT_BYTES, Ranks, group_without_shared_memory
from helpers.refusals import REFUSALS, assert_every_rank_reports, assert_refused, refused_calls
from helpers.values import EVERY_DTYPE, ROW_SHAPES, name_of, random_bytes
from sgl_comm import testing
from sgl_comm.testing import RankContext


def around_the_chunk(ctx: RankContext) -> list[str]:
    """Sizes at which the number of steps changes, and a large one."""
    wrong = []
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.complex128):
        slot = SLOT_BYTES // dtype.itemsize
        for count in (slot - 1, slot, slot + 1, 2 * slot, 3 * slot + 5):
            values = random_bytes(ctx.world, (count,), dtype)
            layout = testing.layouts((count,))["offset"]
            call = AllGather(name_of(dtype, count), values, [layout] * ctx.world, ctx.group.group_name, ctx.rank)
            wrong += run_calls(ctx, [call])
    shape = (7, (2**19 + 3) // 7)
    values = random_bytes(ctx.world, shape, torch.float32)
    for names, layouts in (("row-major", ["row_major"]), ("mixed", ["transposed", "row_major", "expanded"])):
        mixed = [testing.layouts(shape)[layouts[rank % len(layouts)]] for rank in range(ctx.world)]
        call = AllGather(name_of("large", names), values, mixed, ctx.group.group_name, ctx.rank)
        wrong += run_calls(ctx, [call])
    return wrong


def lazy_views(ctx: RankContext) -> list[str]:
    """A conjugate and a negation that torch has not carried out yet."""
    x = torch.view_as_complex(torch.arange(12.0).view(6, 2)).to(ctx.device) + ctx.rank
    every = torch.cat([x - ctx.rank + rank for rank in range(ctx.world)])
    wrong = []
    for name, view in (("conj", torch.Tensor.conj), ("conj.imag", lambda z: z.conj().imag)):
        out = torch.ops.sgl_comm.all_gather(view(x), ctx.group.group_name)
        wrong += difference(out.cpu(), view(every).cpu().resolve_conj().resolve_neg(), name)
    return wrong


def by_the_own_backend(ctx: RankContext) -> list[str]:
    """Where no shared memory serves: still every dtype, bit for bit."""
    wrong = []
    with group_without_shared_memory(ctx) as group:
        for shape in ((0,), (5,), (3, 4), (4, 0), (2, 3, 4, 5)):
            for dtype in EVERY_DTYPE:
                values = random_bytes(ctx.world, shape, dtype, "fallback")
                calls = calls_of_every_layout(ctx, AllGather, name_of(dtype, shape), values, group)
                wrong += run_calls(ctx, calls if ctx.device.type == "cpu" else calls[-1:])
    return wrong


def cause_is_told(ctx: RankContext) -> str:
    """Torch's own error, once its group is gone."""
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgl_comm.backends.shm_all_reduce.why_not_world_size", lambda world: "the test wants it so")
        comm = sgl_comm.init(group)
    dist.destroy_process_group(group)
    with comm:
        return error_text(lambda: comm.all_gather(torch.ones(3)))


def refused(ctx: RankContext) -> dict[str, str]:
    return refused_calls(ctx, sgl_comm.ops.all_gather)


def test_every_dtype_size_and_layout(ranks: Ranks) -> None:
    ranks.all_right(run_every_layout, AllGather, ROW_SHAPES, EVERY_DTYPE)


def test_sizes_around_the_chunk_and_a_large_one(ranks: Ranks) -> None:
    ranks.all_right(around_the_chunk)


def test_no_value_is_changed(ranks: Ranks) -> None:
    ranks.all_right(run_signal_like_values, AllGather)


def test_lazy_conjugates_and_negations(ranks: Ranks) -> None:
    ranks.all_right(lazy_views)


def test_the_own_backend_serves_where_shared_memory_does_not(ranks: Ranks) -> None:
    ranks.all_right(by_the_own_backend)


def test_an_error_of_the_own_backend_is_told() -> None:
    for text in Ranks("cpu", 2).run(cause_is_told):
        assert text.startswith("sgl_comm::all_gather: the fallback to the own backend of group '")
        assert "(NCCL or gloo) failed on float32[3] on cpu: RuntimeError: Could not resolve the process group" in text
        assert "Exception raised from" not in text


def test_bad_arguments_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    assert_refused("all_gather", ranks.world, ranks.run(refused), REFUSALS)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("op", "count", "dtype", "words"),
    [
        ("all_gather", 1001, torch.float32, "all_gather of 1001 float32"),
        ("all_gather", 0, torch.float32, "all_gather of 0 float32"),
        ("all_gather", 500_000, torch.float32, "all_gather of 500000 float32"),
        ("all_gather", 1000, torch.int32, "all_gather of 1000 int32"),
        ("all_gather", 1000, torch.float8_e5m2, "all_gather of 1000 float8_e5m2"),
        ("all_reduce", 1000, torch.float32, "all_reduce of 1000 float32"),
    ],
    ids=str,
)
def test_ranks_that_differ_get_an_error_on_every_rank(
    world: int, op: str, count: int, dtype: torch.dtype, words: str
) -> None:
    assert_every_rank_reports("all_gather", world, op, count, dtype, words)


def test_200_calls_among_others_on_one_communicator(ranks: Ranks) -> None:
    ranks.all_right(interleaved, [AllGather, AllReduce], 200)
