"""Where a test runs: on which device and with how many ranks, and what it does between its calls."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sgl_comm
from helpers.compare import assert_none_wrong
from sgl_comm.backends import shm_all_reduce
from sgl_comm.testing import RankContext, RankPool, run_ranks

CPU_WORLDS, GPU_WORLDS = (1, 2, 3, 4, 5, 8), (2, 3, 4, 5, 6, 7, 8)

SLOT_BYTES = 256 << 10
"""How much a rank of the CPU passes to its peers in one step."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where a test runs."""

    device: str
    world: int

    def run(self, fn: Callable[..., Any], *args: Any, deadline: float = 120.0) -> list[Any]:
        return run_ranks(fn, self.world, *args, device=self.device, deadline=deadline)

    def all_right(self, fn: Callable[..., list[str]], *args: Any, deadline: float = 120.0) -> None:
        """Runs a function that gives what is wrong on its rank; fails, where the test calls this, with that."""
        __tracebackhide__ = True
        assert_none_wrong(self.run(fn, *args, deadline=deadline))


def ranks_on(device: str, worlds: Sequence[int]) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param(Ranks(device, world), id=f"{device}-{world}", marks=marks) for world in worlds]


def synchronize(ctx: RankContext) -> None:
    """Waits until no rank's kernels are on the GPU: a copy would take turns with the waiting ones."""
    if ctx.device.type == "cuda":
        torch.cuda.synchronize()
        dist.barrier(ctx.group)


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


@contextmanager
def group_without_shared_memory(ctx: RankContext) -> Iterator[str]:
    """The name of a group of all ranks that its own backend must serve, on every device."""
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm_all_reduce, "why_not_world_size", lambda world: "the test wants it so")
        comm = sgl_comm.init(group, "cpu")
    yield group.group_name
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)


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
