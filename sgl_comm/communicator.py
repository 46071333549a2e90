"""``init`` and ``Communicator``: one group of ranks, and whatever serves it best."""

from __future__ import annotations

import logging
import weakref
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm import _library
from sgl_comm import ops as sgl_ops
from sgl_comm.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.errors import SglCommError
from sgl_comm.rendezvous import Rendezvous
from sgl_comm.shm_all_reduce import ShmAllReduce

logger = logging.getLogger(__name__)

_ops = torch.ops.sgl_comm

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
        max_size: bytes a rank's largest one-launch message may have (default 4 MiB); bounds the GPU workspace to
            2 * world * max_size and a little, and nothing else: larger messages pass through it in chunks.

    Returns:
        The group's ``Communicator``; also a context manager.

    Raises:
        SglCommError: no such group, this process is not in it, it already has a communicator, or a bad setting.
    """
    return Communicator(group, device, max_size)


class Communicator:
    """One group of ranks. Made by ``init``; ends with ``close``."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        max_size: int | None = None,
    ) -> None:
        link = Rendezvous.of(group, _as_torch_device(device))
        self.group_name: str = link.name
        self.rank: int = link.rank
        self.world_size: int = link.world
        self.device, problem = _device_of(link, device)
        link.refuse_together(problem)
        link.must_be_alike("devices", self.device.type)
        _forget_dead_group(link)
        self._group = weakref.ref(link.group)
        self._fallback = link.backend
        self._closed = False
        self._shm = ShmAllReduce(link.group, self.device)
        self._v2: CustomAllReduceV2 | None = None
        try:
            if self.device.type == "cuda":
                self._v2 = CustomAllReduceV2(link.group, self.device, max_size)
            elif not _library.cuda_missing:  # a CUDA tensor takes the fallback
                _ops._cuda_group_open(link.name, link.rank, link.world)
                _ops._v2_settle(link.name, False)
        except BaseException:
            self._shm.close()
            raise
        _live[link.name] = self
        logger.log(logging.INFO if not self.reason else logging.WARNING, "%s", self)

    @property
    def backend(self) -> str:
        """What serves sums of float tensors on ``device``: "v2", "shm", or the group's own backend ("gloo", "nccl")."""
        if self._v2 is not None:
            return self._fallback if self._v2.disabled else "v2"
        return self._fallback if self._shm.disabled else "shm"

    @property
    def reason(self) -> str:
        """Why nothing better than the group's own backend serves; empty where something does."""
        return self._v2.reason if self._v2 is not None else self._shm.reason

    def __repr__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"sgl_comm: group {self.group_name!r}, rank {self.rank} of {self.world_size}, {self.device}:"
            f" served by {self.backend}{why}"
        )

    def all_reduce(self, input: Tensor, reduce_op: str = "sum") -> Tensor:
        """The sum of every rank's ``input``, as a new row-major tensor. See ``sgl_comm.ops.all_reduce``."""
        return sgl_ops.all_reduce(input, self.group_name, reduce_op)

    def all_reduce_(self, input: Tensor, reduce_op: str = "sum") -> None:
        """The same, in place, for any strides. See ``sgl_comm.ops.all_reduce_``."""
        sgl_ops.all_reduce_(input, self.group_name, reduce_op)

    def reduce_scatter(self, input: Tensor) -> Tensor:
        """This rank's share of the sum, divided along dim 0. See ``sgl_comm.ops.reduce_scatter``."""
        return sgl_ops.reduce_scatter(input, self.group_name)

    def all_gather(self, input: Tensor) -> Tensor:
        """Every rank's ``input`` along dim 0, in rank order. See ``sgl_comm.ops.all_gather``."""
        return sgl_ops.all_gather(input, self.group_name)

    def check(self) -> None:
        """Raises ``SglCommError`` if an earlier call has failed, on this rank or a peer; makes no call of its own.

        A GPU's failure is seen here as soon as the kernel that gave up has ended; it does not wait for it.
        """
        if self._closed:
            raise SglCommError(f"check: the communicator of group {self.group_name!r} is closed")
        fault = self._shm.fault() or (self._v2.fault() if self._v2 is not None else "")
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
        if self._v2 is not None:
            self._v2.close()
        elif not _library.cuda_missing:
            _ops._cuda_group_close(self.group_name)
        self._shm.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_torch_device(device: torch.device | str | int | None) -> torch.device | None:
    if device is None:
        return None
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _device_of(link: Rendezvous, device: torch.device | str | int | None) -> tuple[torch.device, str]:
    """The device that is meant, and what is wrong with it or an empty text."""
    chosen = _as_torch_device(device)
    if chosen is None:
        chosen = torch.device("cuda" if "nccl" in link.backend and torch.cuda.is_available() else "cpu")
    if chosen.type == "cpu":
        return chosen, ""
    if chosen.type != "cuda":
        return chosen, f"got device {device!r}; expected the CPU or a CUDA device"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 or (chosen.index or 0) >= count:
        return chosen, f"got device {device!r}; expected one of the {count} CUDA devices that torch can use"
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index), ""


def _forget_dead_group(link: Rendezvous) -> None:
    """Closes the communicator of an earlier group of this name: torch gives names like "0" again after a new start."""
    old = _live.get(link.name)
    if old is not None and old._group() is not link.group:
        old.close()
