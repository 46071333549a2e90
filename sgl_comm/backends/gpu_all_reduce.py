"""What ``CustomAllReduceV1`` and ``CustomAllReduceV2`` share: a communicator of the CUDA library, and its set-up."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm import _library, envs
from sgl_comm import ops as sgl_ops
from sgl_comm.backends import capability, open_groups
from sgl_comm.backends.capability import SUPPORTED_DTYPES, Survey, as_device
from sgl_comm.backends.rendezvous import Rendezvous, shared_status
from sgl_comm.backends.thresholds import ALL_SIZES, Thresholds, thresholds_for
from sgl_comm.errors import why_not

_ops = torch.ops.sgl_comm

MIN_MAX_SIZE = 64 << 10
"""Bytes; ``max_size`` is a multiple of it."""

MOST_MAX_SIZE = 256 << 20


class GpuAllReduce:
    """All-reduce between GPUs of one host by kernels of this package; ``disabled`` where they cannot serve.

    Args:
        group: the ranks, or None for the default group. Making one is a collective call.
        device: this rank's GPU. Several ranks may share one.
        max_size: see the class; None for its default. Alike on all ranks.
        found: what ``capability.survey`` has found for this group, if it has been asked already.

    Raises:
        SglCommError: the group already has a communicator, or a bad max_size or environment variable.
    """

    version: ClassVar[str]
    """"v1" or "v2": in the name of its op, and its field in a Survey."""
    protocol: ClassVar[str]
    """"pull" or "push": what the CUDA library calls it."""

    def __init__(
        self,
        group: ProcessGroup | None,
        device: torch.device | str | int,
        max_size: int | None = None,
        *,
        found: Survey | None = None,
    ) -> None:
        self.device = as_device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        rendezvous = Rendezvous.of(group, self.device)
        self.group_name = rendezvous.name
        self.world_size = rendezvous.world
        self._group = weakref.ref(rendezvous.group)
        self._registered = False
        self.thresholds = Thresholds(ALL_SIZES, ALL_SIZES, ALL_SIZES)
        problem = _bad_max_size(max_size) or why_not(lambda: self._try_to_open(rendezvous))
        try:
            rendezvous.refuse_together(problem)
            self.reason = getattr(found or capability.survey(rendezvous, self.device), self.version)
            if not self.reason and rendezvous.world > 1:  # one rank alone is served without a workspace
                self.thresholds = self._thresholds(rendezvous)
                self.reason = self._set_up(rendezvous, max_size or self._default_max_size(rendezvous.world))
            if self._registered:
                served = not self.reason and rendezvous.world > 1
                _ops._cuda_settle(rendezvous.name, self.protocol, served, self.reason)
        except BaseException:
            self.close()
            raise
        self.disabled = bool(self.reason)

    def _default_max_size(self, world: int) -> int:
        """Bytes, where the caller gives no ``max_size``."""
        raise NotImplementedError

    def _try_to_open(self, rendezvous: Rendezvous) -> None:
        """Registers the group with the CUDA library, if there is one."""
        envs.timeout_seconds()
        envs.first_epoch()
        envs.invariant()
        if not _library.cuda_missing:
            _ops._cuda_open(
                rendezvous.name,
                self.protocol,
                rank=rendezvous.rank,
                world=rendezvous.world,
                backend=rendezvous.backend_for("cuda"),
                compare_calls=envs.check(),
            )
            open_groups.add(rendezvous.name, rendezvous.world)
            self._registered = True

    def _thresholds(self, rendezvous: Rendezvous) -> Thresholds:
        found = thresholds_for(rendezvous.world, torch.cuda.get_device_capability(self.device))
        may_fall_back = not envs.invariant() and rendezvous.backend_for("cuda") == "nccl"
        return found if may_fall_back else dataclasses.replace(found, fallback_bytes=ALL_SIZES)

    def _set_up(self, rendezvous: Rendezvous, max_size: int) -> str:
        """Makes and shares the workspace. Returns why it cannot be used, the same on every rank; empty if it can."""
        mine = _ops._cuda_publish(
            rendezvous.name,
            self.protocol,
            device=self.device.index,
            max_size=max_size,
            **dataclasses.asdict(self.thresholds),
            timeout=envs.timeout_seconds(),
            first_epoch=envs.first_epoch(),
            ledger=_ops._ledger(rendezvous.name),
        )
        handles = rendezvous.all_gather(mine)
        return rendezvous.agree(_ops._cuda_attach(rendezvous.name, self.protocol, handles))

    def should_custom_ar(self, input: Tensor) -> bool:
        """Whether the kernels serve this tensor. Its size matters with ``SGLCOMM_INVARIANT=0`` alone."""
        return (
            not self.disabled
            and input.device == self.device
            and input.dtype in SUPPORTED_DTYPES
            and input.nbytes <= self.thresholds.fallback_bytes
        )

    def custom_all_reduce(self, input: Tensor) -> Tensor | None:
        """The sum of every rank's input as a new tensor, or None where ``should_custom_ar`` is False."""
        op = getattr(sgl_ops, f"custom_all_reduce_{self.version}")
        return op(input, self.group_name) if self.should_custom_ar(input) else None

    def _rendezvous(self, op: str) -> Rendezvous:
        return Rendezvous.again(self._group, self.device, op)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the capture of CUDA graphs. A collective call: an error on one rank inside it is one on all.

        Raises:
            SglCommError: another rank raised an error inside it.
        """
        with shared_status(self._rendezvous("capture"), "capture"):
            yield

    def fault(self) -> str:
        """Why the communicator has become unusable; empty while it is not. Does not wait for the GPU."""
        return _ops._cuda_fault(self.group_name, self.protocol) if self._registered else ""

    def close(self) -> None:
        """Waits for this rank's kernels and gives the workspace up; a peer that still calls gets an error in time.

        A CUDA graph that holds calls of this communicator must not be replayed afterwards: its memory is gone.
        """
        if self._registered:
            self._registered = False
            open_groups.remove(self.group_name)
            _ops._cuda_close(self.group_name, self.protocol)


def _bad_max_size(max_size: int | None) -> str:
    """What is wrong with it, or an empty text."""
    if max_size is None or (0 < max_size <= MOST_MAX_SIZE and max_size % MIN_MAX_SIZE == 0):
        return ""
    return f"got max_size {max_size}; expected a multiple of {MIN_MAX_SIZE} bytes, above 0 and up to {MOST_MAX_SIZE}"
