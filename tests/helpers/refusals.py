"""What the tests of several ops share: calls that are refused on one rank, or on all since the ranks differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.errors import error_text
from helpers.ranks import Ranks
from sgl_comm.testing import RankContext


def refused_calls(ctx: RankContext, op: Callable[[Tensor, str], Tensor]) -> dict[str, str]:
    """Bad arguments on rank 0 alone; after each the ranks are in step still. What was bad -> the error of rank 0."""
    x, name = torch.ones(ctx.world, 2, device=ctx.device), ctx.group.group_name
    bad: dict[str, tuple[Tensor, str]] = {
        "requires grad": (x.clone().requires_grad_(), name),
        "unknown group": (x, "nowhere"),
        "no dimension": (torch.ones((), device=ctx.device), name),
        "sparse": (x.to_sparse(), name),
    }
    if ctx.world > 1:
        bad["rows"] = (torch.ones(ctx.world + 1, 2, device=ctx.device), name)
    texts = {}
    for what, arguments in bad.items():
        if ctx.rank == 0 and not (what == "rows" and op is sgl_comm.ops.all_gather):
            texts[what] = error_text(lambda arguments=arguments: op(*arguments))
        total = torch.ops.sgl_comm.all_reduce(x, name)
        if total.unique().tolist() != [ctx.world]:
            texts[what] = f"the call afterwards gave {total.unique().tolist()}"
    with torch.no_grad():
        op(x.requires_grad_(), name)
    return texts


REFUSALS = {
    "requires grad": "that requires grad; expected one that does not",
    "unknown group": "unknown group 'nowhere'; call sgl_comm.init(group) first",
    "no dimension": "; expected at least one dimension",
    "sparse": "got a tensor without strides",
}
"""What is bad in ``refused_calls`` -> words of the error."""


def assert_refused(op: str, world: int, results: Sequence[dict[str, str]], expected: dict[str, str]) -> None:
    """For what ``refused_calls`` gave: rank 0 got these errors, and nobody else any."""
    texts, *others = results
    assert others == [{}] * (world - 1)
    assert texts.keys() == expected.keys()
    for what, words in expected.items():
        assert texts[what].startswith(f"sgl_comm::{op}: ")
        assert words in texts[what]


def errors_of_differing_calls(
    ctx: RankContext, op: str, op_of_rank_1: str, count_of_rank_1: int, dtype_of_rank_1: torch.dtype
) -> str:
    """The ranks call `op` of 1000 float32, rank 1 another. Every rank's error; a new communicator works."""
    x = torch.ones(1000)
    if ctx.rank == 1:
        op, x = op_of_rank_1, torch.ones(count_of_rank_1).to(dtype_of_rank_1)
    group = dist.new_group(list(range(ctx.world)))
    with sgl_comm.init(group) as comm:
        text = error_text(lambda: getattr(comm, op)(x))
        assert error_text(comm.check).endswith(text.partition(": rank ")[2].partition(": ")[2])
        dist.barrier(ctx.group)
    with sgl_comm.init(group) as comm:
        assert comm.all_reduce(torch.ones(3)).tolist() == [ctx.world] * 3
    dist.destroy_process_group(group)
    return text


def assert_every_rank_reports(op: str, world: int, other: str, count: int, dtype: torch.dtype, words: str) -> None:
    """Rank 1 makes another call than `op` of 1000 float32: the error of every rank names both, and rank 1."""
    for text in Ranks("cpu", world).run(errors_of_differing_calls, op, other, count, dtype, deadline=30):
        assert f"called {op} of 1000 float32" in text
        assert f"called {words}" in text
        assert "rank 1" in text
