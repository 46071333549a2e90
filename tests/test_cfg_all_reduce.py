"""cfg_all_reduce between real processes: all_reduce's bits for every layout, in place in the caller's own tensor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from cases import (
    CPU_WORLDS,
    DTYPES,
    CfgAllReduce,
    Ranks,
    differs,
    error_text,
    group_without_shared_memory,
    layouts_of_ranks,
    name_of,
    random_values,
    ranks_on,
    run_calls,
)
from torch import Tensor

import sgl_comm
from sgl_comm.testing import RankContext
from sgl_comm.work import Work

SHAPES = ((), (0,), (4, 0), (1,), (7,), (10, 100), (5, 10, 20), (2, 4, 10, 13), (2, 3, 2, 4, 3), (3, 40_001))

every_world = pytest.mark.parametrize("ranks", [*ranks_on("cpu", CPU_WORLDS), *ranks_on("cuda", (2, 3, 4, 8))])
some_worlds = pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3)), *ranks_on("cuda", (2, 3))])


def calls_of_every_layout(ctx: RankContext, group: str, name: str, values: Sequence[Tensor]) -> list[CfgAllReduce]:
    """Functional and in place, with and without ``async_op``."""
    calls = []
    for in_place in (False, True):
        for names, layouts in layouts_of_ranks(values[0].shape, ctx.world, in_place):
            for async_op in (False, True):
                label = name_of(name, names, "in place" if in_place else "functional", "async" if async_op else "")
                calls.append(CfgAllReduce(label, values, layouts, group, ctx.rank, in_place, async_op))
    return calls


def matrix(ctx: RankContext) -> list[str]:
    wrong = []
    for shape in SHAPES:
        for dtype in DTYPES:
            values = random_values(ctx.world, shape, dtype)
            label = name_of(dtype, shape)
            wrong += run_calls(ctx, calls_of_every_layout(ctx, ctx.group.group_name, label, values))
    return wrong


def whole_numbers(ctx: RankContext) -> list[str]:
    """What the package does not sum by itself, and groups that it does not serve: any order gives these bits."""
    wrong = []
    with group_without_shared_memory(ctx) as other:
        for group, dtypes in ((ctx.group.group_name, (torch.int64,)), (other, (torch.int64, torch.float32))):
            for shape in ((), (0,), (5, 10, 20), (2, 4, 10, 13)):
                for dtype in dtypes:
                    wrong += sums_of_whole_numbers(ctx, group, shape, dtype)
    return wrong


def sums_of_whole_numbers(ctx: RankContext, group: str, shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    count = torch.empty(shape, device="meta").numel()
    every = [(torch.arange(count).view(shape) * 3 + rank).to(ctx.device, dtype) for rank in range(ctx.world)]
    wrong = []
    for async_op in (False, True):
        x = every[ctx.rank].clone()
        if shape:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        work = sgl_comm.ops.cfg_all_reduce_(x, group, async_op=async_op)
        assert isinstance(work, Work) is async_op
        assert not isinstance(work, Work) or work.wait() is None
        wrong += differs(x, torch.stack(every).sum(0).to(dtype), name_of(dtype, shape, async_op))
    largest = sgl_comm.ops.cfg_all_reduce(every[ctx.rank], group, "max")
    wrong += differs(largest, every[-1], name_of("max", dtype, shape))
    return wrong


def refusals(ctx: RankContext) -> dict[str, str]:
    """Bad arguments on every rank: what was bad -> the error. After each, calls work."""
    name, x = ctx.group.group_name, torch.ones(4, 3, device=ctx.device)
    ops = sgl_comm.ops
    bad = {
        "reduce_op": lambda: ops.cfg_all_reduce(x, name, "mean"),
        "grad": lambda: ops.cfg_all_reduce_(x.clone().requires_grad_(), name),
        "overlap": lambda: ops.cfg_all_reduce_(x[:1].expand(4, 3), name),
        "async overlap": lambda: ops.cfg_all_reduce_(x[:1].expand(4, 3), name, async_op=True),
        "sparse": lambda: ops.cfg_all_reduce(x.to_sparse(), name),
        "unknown group": lambda: ops.cfg_all_reduce(x, "nowhere"),
    }
    texts = {}
    for what, call in bad.items():
        texts[what] = error_text(call)
        total = ops.cfg_all_reduce(x, name)
        if total.unique().tolist() != [ctx.world]:
            texts[what] = f"the call afterwards gave {total.unique().tolist()}"
    return texts


def errors_where_rank_0_refuses(ctx: RankContext) -> list[str]:
    """Rank 0 passes a tensor that overlaps itself, the others a good one of the same shape; then all sum that again."""
    group = dist.new_group(list(range(ctx.world)))
    with sgl_comm.init(group) as comm:
        x = torch.ones(1).expand(1000) if ctx.rank == 0 else torch.ones(1000)
        texts = [
            error_text(lambda: comm.cfg_all_reduce_(x)),
            error_text(lambda: comm.cfg_all_reduce_(torch.ones(1000))),
        ]
        dist.barrier(ctx.group)
    dist.destroy_process_group(group)
    return texts


def work_of(ctx: RankContext) -> list[str]:
    """What ``async_op`` gives on the CPU."""
    comm = ctx.comm
    assert comm is not None
    base = torch.zeros(6, 8)
    x = base.t()[1:5, ::2]
    works = [comm.cfg_all_reduce_(x.add_(1), async_op=True), comm.cfg_broadcast_(x, 0, async_op=True)]
    results = [comm.cfg_all_reduce(x, async_op=True), comm.cfg_broadcast(x, 0, async_op=True)]
    wrong = [f"got {type(each).__name__}" for each in (*works, *results) if not isinstance(each, Work)]
    assert all(each.is_completed() for each in (*works, *results))
    assert [each.wait() for each in works] == [None, None]
    assert x.unique().tolist() == [ctx.world]
    assert base.sum() == x.sum(), "what lies between the strides stays"
    assert [each.wait().unique().tolist() for each in results] == [[ctx.world**2], [ctx.world]]
    return wrong


def copies(ctx: RankContext) -> dict[str, int]:
    """How often the library copies for the sake of a layout: what was called -> copies."""
    comm, found = ctx.comm, {}
    assert comm is not None
    calls = {
        "all_reduce": comm.cfg_all_reduce,
        "all_reduce_": comm.cfg_all_reduce_,
        "broadcast": lambda x: comm.cfg_broadcast(x, 0),
        "broadcast_": lambda x: comm.cfg_broadcast_(x, 0),
    }
    for name, call in calls.items():
        for layout, x in (
            ("row-major", torch.ones(3, 5)),
            ("offset", torch.ones(16)[1:]),
            ("strided", torch.ones(3, 5).t()),
        ):
            before = torch.ops.sgl_comm._layout_copies()
            call(x)
            found[f"{name}, {layout}"] = torch.ops.sgl_comm._layout_copies() - before
    return found


@every_world
def test_every_layout_in_place_and_not(ranks: Ranks) -> None:
    ranks.all_right(matrix)


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3, 4)), *ranks_on("cuda", (2,))])
def test_other_dtypes_and_groups_without_shared_memory(ranks: Ranks) -> None:
    ranks.all_right(whole_numbers)


def test_async_op_is_refused_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(sgl_comm.SglCommError, match=r"^sgl_comm::cfg_all_reduce_: got async_op=True under torch"):
        sgl_comm.ops.cfg_all_reduce_(torch.ones(3), "any", async_op=True)


def test_a_row_major_tensor_is_not_copied_and_a_strided_one_is() -> None:
    for rank, found in enumerate(Ranks("cpu", 2).run(copies)):
        strided = {"all_reduce": 1, "all_reduce_": 2, "broadcast": 0, "broadcast_": 1}
        expected = {f"{name}, {layout}": 0 for name in strided for layout in ("row-major", "offset")}
        expected |= {f"{name}, strided": count for name, count in strided.items()}
        assert found == expected, f"rank {rank}"


@pytest.mark.parametrize("ranks", ranks_on("cpu", (1, 2, 3)))
def test_work(ranks: Ranks) -> None:
    ranks.all_right(work_of)


@some_worlds
def test_what_every_rank_refuses_leaves_the_group_as_it_was(ranks: Ranks) -> None:
    words = {
        "reduce_op": "sgl_comm::cfg_all_reduce: got reduce_op 'mean'; expected one of sum, ",
        "grad": "sgl_comm::cfg_all_reduce_: got Float[4, 3] on cpu that requires grad; expected one that does not",
        "overlap": "sgl_comm::cfg_all_reduce_: got Float[4, 3] on cpu in which several elements share memory",
        "async overlap": "sgl_comm::cfg_all_reduce_: got Float[4, 3] on cpu in which several elements share memory",
        "sparse": "sgl_comm::cfg_all_reduce: got a tensor without strides",
        "unknown group": "sgl_comm::cfg_all_reduce: unknown group 'nowhere'; call sgl_comm.init(group) first",
    }
    for texts in ranks.run(refusals):
        assert texts.keys() == words.keys()
        for what, text in texts.items():
            assert text.startswith(words[what].replace("on cpu", f"on {ranks.device}"))


@pytest.mark.parametrize("world", [2, 3])
def test_what_one_rank_alone_refuses_is_never_summed_with_its_next_call(world: int) -> None:
    """That next call is the same to the last element: without a count of refusals it would be taken for this one."""
    first, *peers = Ranks("cpu", world).run(errors_where_rank_0_refuses, deadline=30)
    assert "several elements share memory" in first[0]
    assert "rank 0 has refused a call that rank" in first[1]
    for texts in peers:
        assert all("rank 0 has refused a call that rank" in text for text in texts)
