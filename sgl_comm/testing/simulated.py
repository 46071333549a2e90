"""Ranks as streams of one GPU in one process: true concurrency without a second GPU.

Good for timing kernels against kernels (no NVLink is between them) and for compute-sanitizer. All ranks' blocks must
fit on the GPU at once, which the communicators see to, and buffers should exist before a kernel waits for its peers.
Streams must not share one of the driver's queues, of which there are 8 unless CUDA_DEVICE_MAX_CONNECTIONS is set: a
rank's second kernel, which waits for its first one, would hold up another rank's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_comm import envs
from sgl_comm.backends import open_groups
from sgl_comm.backends.custom_all_reduce_v1 import DEFAULT_MAX_SIZE
from sgl_comm.backends.custom_all_reduce_v2 import default_max_size
from sgl_comm.backends.thresholds import ALL_SIZES, thresholds_for
from sgl_comm.errors import SglCommError

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
        faults = (_ops._cuda_fault(self.group_name, protocol) for protocol in ("push", "pull"))
        return next(filter(None, faults), "")


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
    thresholds = dataclasses.replace(
        found, one_shot_bytes=one_shot_bytes or found.one_shot_bytes, fallback_bytes=ALL_SIZES
    )
    max_sizes = {"push": max_size or default_max_size(world), "pull": DEFAULT_MAX_SIZE}
    with torch.cuda.device(device), ExitStack() as opened:
        for rank, group_name in enumerate(names):
            for protocol in max_sizes:
                _ops._cuda_open(group_name, protocol, rank, world, "none")
                opened.callback(_ops._cuda_close, group_name, protocol)
            open_groups.add(group_name, world)
            opened.callback(open_groups.remove, group_name)
        for protocol, size in max_sizes.items():
            settings = {
                "device": device,
                "max_size": size,
                "first_epoch": first_epoch,
                **dataclasses.asdict(thresholds),
            }
            _set_up(names, protocol, settings)
        yield [SimulatedRank(r, world, group_name, torch.cuda.Stream()) for r, group_name in enumerate(names)]
        torch.cuda.synchronize()


def _set_up(names: Sequence[str], protocol: str, settings: dict[str, int]) -> None:
    """What ``init`` does on each rank for one protocol, step by step for all ranks."""
    timeout = envs.timeout_seconds()
    handles = torch.cat(
        [_ops._cuda_publish(name, protocol, **settings, timeout=timeout, ledger=_ops._ledger(name)) for name in names]
    )
    reasons = [_ops._cuda_attach(name, protocol, handles) for name in names]
    if any(reasons):
        raise SglCommError(f"make_simulated: {next(filter(None, reasons))}")
    for name in names:
        _ops._cuda_settle(name, protocol, True, "")


@contextmanager
def capture_simulated(ranks: Sequence[SimulatedRank]) -> Iterator[None]:
    """``Communicator.capture`` of simulated ranks: V1's captured calls inside it read their inputs without a copy."""
    for rank in ranks:
        _ops._cuda_begin_capture(rank.group_name)
    yield
    handles = torch.cat([_ops._cuda_end_capture(rank.group_name) for rank in ranks])
    for rank in ranks:
        reason = _ops._cuda_register_inputs(rank.group_name, handles)
        if reason:
            raise SglCommError(f"capture_simulated: {reason}")
