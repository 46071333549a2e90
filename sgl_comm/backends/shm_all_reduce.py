"""All-reduce between the processes of one host through shared memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm import envs
from sgl_comm import ops as sgl_ops
from sgl_comm.backends import open_groups
from sgl_comm.backends.capability import SUPPORTED_DTYPES, why_not_world_size
from sgl_comm.backends.rendezvous import Rendezvous, shared_status
from sgl_comm.errors import SglCommError, why_not

_ops = torch.ops.sgl_comm


def _open(rendezvous: Rendezvous) -> None:
    """Registers the group."""
    envs.timeout_seconds()
    envs.first_epoch()
    _ops._shm_open(rendezvous.name, rendezvous.rank, rendezvous.world, compare_calls=envs.check())
    open_groups.add(rendezvous.name, rendezvous.world)


class ShmAllReduce:
    """Owns a group's entry in the CPU registry and, where all ranks share a host, its shared-memory segment.

    The segment is anonymous: (2 * world + 2) slots of 256 KiB, whatever the size of the messages.

    Args:
        group: the ranks, or None for the default group. Making one is a collective call.
        device: this rank's GPU if the group has no CPU backend; the CPU's tensors are what is served.
        max_size: accepted for the protocol's sake; every size is served.

    Raises:
        SglCommError: the group already has a communicator; or its ranks are to compare calls and have no way to.
    """

    def __init__(
        self, group: ProcessGroup | None, device: torch.device | str = "cpu", max_size: int | None = None
    ) -> None:
        rendezvous = Rendezvous.of(group, torch.device(device))
        self.group_name = rendezvous.name
        self._group = weakref.ref(rendezvous.group)
        self._device = rendezvous.device
        self._closed = False
        problem = why_not(lambda: _open(rendezvous))
        try:
            rendezvous.refuse_together(problem)
            rendezvous.must_be_alike(f"{envs.CHECK.name} of", str(int(envs.check())))
            self.reason = why_not_world_size(rendezvous.world) or self._set_up(rendezvous)
            if envs.check() and self.reason and rendezvous.backend_for("cpu") == "none":
                raise SglCommError(
                    f"init: got {envs.CHECK.name}=1 and a group that cannot pass CPU tensors ({self.reason}; no gloo):"
                    " expected shared memory or gloo, by which ranks compare their calls"
                )
            _ops._shm_settle(rendezvous.name, not self.reason)
        except BaseException:
            if not problem:
                self.close()
            raise
        self.disabled = bool(self.reason)

    def _set_up(self, rendezvous: Rendezvous) -> str:
        """Makes and shares the segment. Returns why it cannot be used, the same on every rank; empty if it can."""
        handle = _ops._shm_publish(rendezvous.name, envs.timeout_seconds(), envs.first_epoch())
        handles = rendezvous.all_gather(handle)
        return rendezvous.agree(_ops._shm_attach(rendezvous.name, handles))

    def should_custom_ar(self, input: Tensor) -> bool:
        """Whether shared memory serves this tensor."""
        return not self.disabled and input.device.type == "cpu" and input.dtype in SUPPORTED_DTYPES

    def custom_all_reduce(self, input: Tensor) -> Tensor | None:
        """The sum of every rank's input as a new tensor, or None where ``should_custom_ar`` is False."""
        return sgl_ops.all_reduce(input, self.group_name) if self.should_custom_ar(input) else None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the capture of CUDA graphs, of which the CPU takes no part. Collective, as on GPUs.

        Raises:
            SglCommError: another rank raised an error inside it.
        """
        with shared_status(Rendezvous.again(self._group, self._device, "capture"), "capture"):
            yield

    def fault(self) -> str:
        """Why the communicator has become unusable; empty while it is not."""
        return _ops._shm_fault(self.group_name)

    def close(self) -> None:
        """Gives the group's name and memory up. Not collective; a peer that still calls gets an error at once."""
        if not self._closed:
            self._closed = True
            open_groups.remove(self.group_name)
            _ops._shm_close(self.group_name)
