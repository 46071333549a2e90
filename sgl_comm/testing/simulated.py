"""Ranks as streams of one GPU in one process: true concurrency without a second GPU.

Good for timing kernels against kernels (no NVLink is between them) and for compute-sanitizer. All ranks' blocks must
fit on the GPU at once, which the communicators see to, and buffers should exist before a kernel waits for its peers.
Streams must not share one of the driver's queues, of which there are 8 unless CUDA_DEVICE_MAX_CONNECTIONS is set: a
rank's second kernel, which waits for its first one, would hold up another rank's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_comm import _fake, envs
from sgl_comm.custom_all_reduce_v1 import DEFAULT_MAX_SIZE
from sgl_comm.custom_all_reduce_v2 import default_max_size
from sgl_comm.errors import SglCommError
from sgl_comm.thresholds import ALL_SIZES, thresholds_for

_ops = torch.ops.sgl_comm
_numbers = itertools.count()


@dataclass(frozen=True)
class SimulatedRank:
    """One of the ranks: its number, the name that its ops know it by ("name#rank"), and its stream."""

    rank: int
    world: int
    group_name: str
    stream: torch.cuda.Stream

    def all_reduce(self, input: Tensor) -> Tensor:
        """``torch.ops.sgl_comm.all_reduce`` on this rank's stream. Returns at once; the others must call too."""
        with torch.cuda.stream(self.stream):
            return _ops.all_reduce(input, self.group_name)

    def fault(self) -> str:
        """Why one of the rank's communicators has become unusable; empty while they are not."""
        return _ops._v2_fault(self.group_name) or _ops._v1_fault(self.group_name)


@contextmanager
def make_simulated(
    world: int,
    device: int = 0,
    max_size: int | None = None,
    name: str | None = None,
    one_shot_bytes: int | None = None,
    first_epoch: int = 0,
) -> Iterator[list[SimulatedRank]]:
    """``world`` ranks in this process on one GPU, each with a V2 and a V1 communicator, closed at the end.

    Args:
        world: 2 to 8.
        device: the GPU's index.
        max_size: as for ``sgl_comm.init``.
        name: the common part of the group names; None for a new one.
        one_shot_bytes: the largest message that goes by one-shot; None for the table's.
        first_epoch: where epochs are counted from.

    Raises:
        SglCommError: a communicator could not be made.
    """
    base = name if name is not None else f"simulated{next(_numbers)}"
    names = [f"{base}#{rank}" for rank in range(world)]
    found = thresholds_for(world, torch.cuda.get_device_capability(device))
    rest = (one_shot_bytes or found.one_shot_bytes, found.ring_bytes, ALL_SIZES, envs.timeout_seconds(), first_epoch)
    v2 = (device, max_size or default_max_size(world), *rest)
    v1 = (device, DEFAULT_MAX_SIZE, *rest)
    with torch.cuda.device(device), ExitStack() as opened:
        for rank, group_name in enumerate(names):
            _ops._v2_open(group_name, rank, world, "none")
            opened.callback(_ops._v2_close, group_name)
            _ops._v1_open(group_name, rank, world)
            opened.callback(_ops._v1_close, group_name)
            _fake.world_sizes[group_name] = world
            opened.callback(_fake.world_sizes.pop, group_name)
        _set_up(names, _ops._v2_publish, _ops._v2_attach, _ops._v2_settle, v2)
        _set_up(names, _ops._v1_publish, _ops._v1_attach, _ops._v1_settle, v1)
        yield [SimulatedRank(r, world, group_name, torch.cuda.Stream()) for r, group_name in enumerate(names)]
        torch.cuda.synchronize()


def _set_up(names: Sequence[str], publish: Any, attach: Any, settle: Any, args: Sequence[Any]) -> None:
    handles = torch.cat([publish(name, *args, _ops._ledger(name)) for name in names])
    reasons = [attach(name, handles) for name in names]
    if any(reasons):
        raise SglCommError(f"make_simulated: {next(filter(None, reasons))}")
    for name in names:
        settle(name, True, "")


@contextmanager
def capture_simulated(ranks: Sequence[SimulatedRank]) -> Iterator[None]:
    """``Communicator.capture`` of simulated ranks: V1's captured calls inside it read their inputs without a copy."""
    for rank in ranks:
        _ops._v1_begin_capture(rank.group_name)
    yield
    handles = torch.cat([_ops._v1_end_capture(rank.group_name) for rank in ranks])
    for rank in ranks:
        reason = _ops._v1_register(rank.group_name, handles)
        if reason:
            raise SglCommError(f"capture_simulated: {reason}")
