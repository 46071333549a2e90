"""``init`` and ``Communicator``: one group of ranks, and whatever serves it best."""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm import _library, envs
from sgl_comm.backends import capability
from sgl_comm.backends.capability import as_device
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.explanation import Explanation, explain
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.backends.shm_all_reduce import ShmAllReduce
from sgl_comm.errors import SglCommError
from sgl_comm.ops import GroupOps

logger = logging.getLogger(__name__)

_ops = torch.ops.sgl_comm

_NO_PROTOCOL = ""
"""The protocol of a group that the CUDA library knows but has no kernels for."""

_live: dict[str, Communicator] = {}
"""Group name -> the open communicator of it."""


def init(
    group: ProcessGroup | None = None, device: torch.device | str | int | None = None, max_size: int | None = None
) -> Communicator:
    """Makes the communicator of a group; from then on ``torch.ops.sgl_comm`` serves the group by its name.

    A collective call: every rank of the group makes it, and all agree on what serves them.

    Args:
        group: a ``torch.distributed`` group (gloo or NCCL) that this process is in; None for the default group.
        device: where most tensors will be: "cpu", or this rank's GPU ("cuda", "cuda:1", 1). None takes the current
            GPU if the group's backend is NCCL, else the CPU. CPU tensors are served either way.
        max_size: bounds the GPU workspace of the push kernels to 3 * (world - 1) * max_size bytes a rank and 4.5 MiB,
            and nothing else: larger messages pass through it in pieces. A multiple of 65536. By default 8 MiB, or as
            much less as keeps the workspace at 52 MiB; the pull kernels' takes up to 14 MiB more.

    Returns:
        The group's ``Communicator``; also a context manager.

    Raises:
        SglCommError: no such group, this process is not in it, it already has a communicator, or a bad setting.
    """
    return Communicator(group, device, max_size)


class Communicator(GroupOps):
    """One group of ranks, with the ops as methods. Made by ``init``; ends with ``close``."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        max_size: int | None = None,
    ) -> None:
        rendezvous = Rendezvous.of(group, None if device is None else as_device(device))
        self.group_name = rendezvous.name
        self.rank: int = rendezvous.rank
        self.world_size: int = rendezvous.world
        self.device, problem = _device_of(rendezvous, device)
        rendezvous.refuse_together(problem)
        rendezvous.must_be_alike("devices", self.device.type)
        _forget_dead_group(rendezvous)
        self._group = weakref.ref(rendezvous.group)
        self._fallback = rendezvous.backend_for(self.device.type)
        self._closed = False
        self._open_on_cuda = False
        self._shm = ShmAllReduce(rendezvous.group, self.device)
        self._v2: CustomAllReduceV2 | None = None
        self._v1: CustomAllReduceV1 | None = None
        try:
            if self.device.type == "cuda":
                found = capability.survey(rendezvous, self.device)
                self._v2 = CustomAllReduceV2(rendezvous.group, self.device, max_size, found=found)
                self._v1 = CustomAllReduceV1(rendezvous.group, self.device, found=found)
            elif not _library.cuda_missing:  # a CUDA tensor takes the fallback
                backend = rendezvous.backend_for("cuda")
                _ops._cuda_open(
                    rendezvous.name,
                    _NO_PROTOCOL,
                    rendezvous.rank,
                    rendezvous.world,
                    backend,
                    compare_calls=envs.check(),
                )
                self._open_on_cuda = True
        except BaseException:
            self._close_all()
            raise
        _live[rendezvous.name] = self
        logger.log(logging.INFO if not self.reason else logging.WARNING, "%s", self)

    @property
    def backend(self) -> str:
        """What serves sums of float tensors on ``device``: "v2", "v1", "shm", or the group's own ("gloo", "nccl")."""
        if self._v2 is None or self._v1 is None:
            parts = {"shm": self._shm.disabled}
        else:
            parts = {"v2": self._v2.disabled, "v1": self._v1.disabled}
        return next((name for name, disabled in parts.items() if not disabled), self._fallback)

    @property
    def reason(self) -> str:
        """Why nothing better serves; empty where the best there is does."""
        if self._v2 is None or self._v1 is None:
            return self._shm.reason
        if self._v2.disabled and self._v1.disabled and self._v1.reason != self._v2.reason:
            return f"{self._v2.reason}; V1 neither: {self._v1.reason}"
        return self._v2.reason

    def explain(self, input: Tensor, reduce_op: str = "sum") -> Explanation:
        """What serves ``all_reduce`` of this tensor, by which algorithm, why nothing better, and what would help."""
        return explain(self._shm, self._v1, self._v2, self._fallback, input, reduce_op)

    def capture(self) -> AbstractContextManager[None]:
        """Around the capture of CUDA graphs. Collective: an error on one rank inside it is one on all.

        Only V1 needs it, so that peers find the inputs of its captured calls; a graph that holds such calls may be
        replayed once every rank has left it. See ``CustomAllReduceV1.capture``.
        """
        return (self._v1 or self._shm).capture()

    def __repr__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"sgl_comm: group {self.group_name!r}, rank {self.rank} of {self.world_size}, {self.device}:"
            f" served by {self.backend}{why}"
        )

    def check(self) -> None:
        """Raises ``SglCommError`` if an earlier call has failed, on this rank or a peer; makes no call of its own.

        A GPU's failure is seen here as soon as the kernel that gave up has ended; it does not wait for it.
        """
        if self._closed:
            raise SglCommError(f"check: the communicator of group {self.group_name!r} is closed")
        parts = [part for part in (self._shm, self._v1, self._v2) if part is not None]
        fault = next(filter(None, (part.fault() for part in parts)), "")
        if fault:
            raise SglCommError(f"check: rank {self.rank} of group {self.group_name!r}: {fault}")

    def close(self) -> None:
        """Gives up the group's name and memory; safe to call twice, and after a failure. Waits for no collective.

        On CUDA it waits for this rank's kernels. A CUDA graph that holds the communicator's calls must not be replayed
        afterwards.
        """
        if self._closed:
            return
        self._closed = True
        if _live.get(self.group_name) is self:
            del _live[self.group_name]
        self._close_all()

    def _close_all(self) -> None:
        if self._v1 is not None:
            self._v1.close()
        if self._v2 is not None:
            self._v2.close()
        if self._open_on_cuda:
            _ops._cuda_close(self.group_name, _NO_PROTOCOL)
        self._shm.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _device_of(rendezvous: Rendezvous, device: torch.device | str | int | None) -> tuple[torch.device, str]:
    """The device that is meant, and what is wrong with it or an empty text."""
    if device is None:
        device = "cuda" if rendezvous.backend_for("cuda") == "nccl" and torch.cuda.is_available() else "cpu"
    chosen = as_device(device)
    if chosen.type == "cpu":
        return chosen, ""
    if chosen.type != "cuda":
        return chosen, f"got device {device!r}; expected the CPU or a CUDA device"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 or (chosen.index or 0) >= count:
        return chosen, f"got device {device!r}; expected one of the {count} CUDA devices that torch can use"
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index), ""


def _forget_dead_group(rendezvous: Rendezvous) -> None:
    """Closes the communicator of an earlier group of this name: torch gives names like "0" again after a new start."""
    old = _live.get(rendezvous.name)
    if old is not None and old._group() is not rendezvous.group:
        old.close()
