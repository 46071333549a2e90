"""The least an installed sgl_comm must do, on any Python and torch: load, and sum on one rank and on two.

Run as a script from outside the project, so that it meets the installed package and not the source tree.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import sgl_comm
from sgl_comm.build_info import build_info

if TYPE_CHECKING:
    from sgl_comm.testing import RankContext

NUM_RANKS = 2
DEADLINE_S = 120.0


def check_one_rank() -> None:
    """A group of one: the sum is the input, in a tensor of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    comm = sgl_comm.init()
    x = torch.arange(1000, dtype=torch.float32)
    y = torch.ops.sgl_comm.all_reduce(x, comm.group_name)
    assert torch.equal(x, y), "all_reduce on one rank changed the values"
    assert y.data_ptr() != x.data_ptr(), "all_reduce on one rank returned its argument"
    comm.close()
    dist.destroy_process_group()


def sum_on_a_rank(ctx: RankContext) -> bool:
    """What each of several ranks does; whole numbers, so that the sum is exact."""
    assert ctx.comm is not None
    x = torch.arange(1000, dtype=torch.float32) * (ctx.rank + 1)
    y = torch.ops.sgl_comm.all_reduce(x, ctx.comm.group_name)
    factor = ctx.world * (ctx.world + 1) // 2
    return torch.equal(y, torch.arange(1000, dtype=torch.float32) * factor)


def check_two_ranks() -> None:
    """Two processes and their sum."""
    from sgl_comm.testing import run_ranks

    answers = run_ranks(sum_on_a_rank, NUM_RANKS, deadline=DEADLINE_S)
    assert answers == [True] * NUM_RANKS, f"all_reduce on {NUM_RANKS} ranks: right on {answers}"


def main() -> None:
    """Says what is being looked at, then looks."""
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, sgl_comm at {sgl_comm.__file__}")
    print(build_info())
    assert "site-packages" in str(sgl_comm.__file__), "this is the source tree, not an installed package"
    assert hasattr(torch.ops.sgl_comm, "all_reduce"), "the library did not register its ops"
    check_one_rank()
    check_two_ranks()
    print("smoke: ok")


if __name__ == "__main__":
    main()
