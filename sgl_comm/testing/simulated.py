"""Ranks as streams of one GPU in one process: true concurrency without a second GPU.

Good for timing kernels against kernels (there is no link in between) and for compute-sanitizer. All ranks' blocks must
fit on the GPU at once, which the communicators see to, and buffers should exist before a kernel waits for its peers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_comm import envs
from sgl_comm.errors import SglCommError

_ops = torch.ops.sgl_comm
_numbers = itertools.count()


@dataclass(frozen=True)
class SimulatedRank:
    """One of the ranks: its place, the name its ops go by ("name#rank"), and its stream."""

    rank: int
    world: int
    group_name: str
    stream: torch.cuda.Stream

    def all_reduce(self, input: Tensor) -> Tensor:
        """``torch.ops.sgl_comm.all_reduce`` on this rank's stream. Returns at once; the others must call too."""
        with torch.cuda.stream(self.stream):
            return _ops.all_reduce(input, self.group_name)

    def fault(self) -> str:
        """Why the rank's communicator has become unusable; empty while it is not."""
        return _ops._v2_fault(self.group_name)


@contextmanager
def make_simulated(
    world: int, device: int = 0, max_size: int | None = None, name: str | None = None
) -> Iterator[list[SimulatedRank]]:
    """``world`` communicators in this process on one GPU, closed at the end.

    Args:
        world: 2 to 8.
        device: the GPU's index.
        max_size: as for ``sgl_comm.init``.
        name: the common part of the group names; None for a new one.

    Raises:
        SglCommError: a communicator could not be made.
    """
    base = name if name is not None else f"simulated{next(_numbers)}"
    names = [f"{base}#{rank}" for rank in range(world)]
    opened: list[str] = []
    try:
        with torch.cuda.device(device):
            handles = []
            for rank, group_name in enumerate(names):
                _ops._cuda_group_open(group_name, rank, world)
                opened.append(group_name)
                handles.append(_ops._v2_publish(group_name, device, max_size or 0, envs.timeout_seconds()))
            reasons = [_ops._v2_attach(group_name, torch.cat(handles)) for group_name in names]
            if any(reasons):
                raise SglCommError(f"make_simulated: {next(filter(None, reasons))}")
            for group_name in names:
                _ops._v2_settle(group_name, True)
            yield [SimulatedRank(r, world, group_name, torch.cuda.Stream()) for r, group_name in enumerate(names)]
            torch.cuda.synchronize()
    finally:
        for group_name in opened:
            _ops._cuda_group_close(group_name)
