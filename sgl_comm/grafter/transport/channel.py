"""``Channel``: a group of ranks of both sides, and the one way in which tensors go from one to the others."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store

from sgl_comm import ops as sgl_ops
from sgl_comm.backends.capability import why_not_world_size
from sgl_comm.errors import SglCommError
from sgl_comm.grafter.faults import TransportFault
from sgl_comm.grafter.transport.deadline import Deadline
from sgl_comm.grafter.transport.handshake import Member, Session

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ops = torch.ops.sgl_comm


class Channel:
    """A group of ranks by a name that ``torch.ops.sgl_comm`` knows.

    Making one is a collective call of its members. ``backend`` is "gloo"; "nccl", which is gloo with NCCL for CUDA
    tensors; or "shm", shared memory without a group of torch's, with gloo where there is none.
    """

    def __init__(
        self, key: str, name: str, members: Sequence[Member], session: Session, backend: str, deadline: Deadline
    ) -> None:
        self.name, self.members = name, tuple(members)
        self.rank = self.members.index(session.me)
        self._group: ProcessGroup | None = None
        _ops._shm_open(self.name, self.rank, len(members), False)
        try:
            store = PrefixStore(key, session.store)
            reason = self._share_memory(store, deadline) if backend == "shm" else "not wanted"
            if reason:
                if backend == "shm" and self.rank == 0:
                    logger.warning("sgl_comm: grafter: gloo carries %s, since shared memory cannot: %s", key, reason)
                self._make_group(store, session.address, backend, deadline)
            _ops._shm_settle(self.name, not reason)
        except BaseException:
            self.close()
            raise

    def index_of(self, member: Member) -> int:
        """The rank inside this group."""
        return self.members.index(member)

    def all_gather(self, frame: Tensor, deadline: Deadline) -> Tensor:
        """The bytes of all members, a row each."""
        return self._bounded(deadline, lambda: sgl_ops.all_gather(frame.unsqueeze(0), self.name))

    def broadcast(self, tensor: Tensor, source: Member, deadline: Deadline) -> None:
        """Writes ``source``'s tensor into that of every other member."""
        self._bounded(deadline, lambda: sgl_ops.grafter_broadcast_(tensor, self.index_of(source), self.name))

    def receive(self, staging: Tensor, ours: Tensor, take: bool, source: Member, deadline: Deadline) -> Tensor:
        """A receiver's side of ``broadcast``: receives into ``staging``, and returns its comparison with ``ours``.

        The comparison is what ``_grafter_compare`` gives. Both tensors are of one shape and dtype, row-major and on the
        CPU. With ``take`` the received tensor is copied into ``ours``, once all of it is there.
        """
        args = (staging, ours, take, self.index_of(source), self.name)
        return self._bounded(deadline, lambda: _ops._grafter_receive_(*args))

    def close(self) -> None:
        """Releases the name and the memory."""
        _ops._shm_close(self.name)
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._unregister_process_group(self.name)
            self._group = None

    def _bounded(self, deadline: Deadline, call: Callable[[], _T]) -> _T:
        try:
            with sgl_ops.own_errors():
                _ops._limit_waits(self.name, deadline.left())
                return call()
        except SglCommError as error:
            who = ", ".join(str(member) for member in self.members if self.index_of(member) != self.rank)
            late = f" within {deadline.seconds:g} s (timeout)" if deadline.over() else ""
            raise TransportFault(f"the exchange with {who} failed{late}: {error}") from None

    def _share_memory(self, store: Store, deadline: Deadline) -> str:
        """Sets shared memory up. Returns why it cannot be used, alike on every member; empty if it can."""
        unserved = why_not_world_size(len(self.members))
        if unserved:
            return unserved
        handle = _ops._shm_publish(self.name, deadline.left(), 0)
        handles = b"".join(self._all_gather_values(store, "handle", bytes(handle.tolist()), deadline))
        reason = _ops._shm_attach(self.name, torch.frombuffer(bytearray(handles), dtype=torch.uint8))
        reasons = self._all_gather_values(store, "reason", reason.encode(), deadline)
        return next((text.decode() for text in reasons if text), "")

    def _all_gather_values(self, store: Store, what: str, own: bytes, deadline: Deadline) -> list[bytes]:
        """All members' values of one kind, in rank order, by way of the store."""
        store.set_timeout(deadline.left_as_timedelta())
        store.set(f"{what}/{self.rank}", b"." + own)  # a store takes no empty values
        return [store.get(f"{what}/{rank}")[1:] for rank in range(len(self.members))]

    def _make_group(self, store: Store, address: str, backend: str, deadline: Deadline) -> None:
        world, kinds = len(self.members), ProcessGroup.BackendType
        group = ProcessGroup(store, self.rank, world)
        timeout = deadline.left_as_timedelta()
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), self.rank, world, options)
        group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
        if backend == "nccl":
            nccl = _make_nccl(PrefixStore("nccl", store), self.rank, world, timeout)
            group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
        elif torch.cuda.is_available():
            group._register_backend(torch.device("cuda"), kinds.GLOO, gloo)
        group._set_default_backend(kinds.GLOO)
        group._set_group_name(self.name)
        dist.distributed_c10d._register_process_group(self.name, group)
        self._group = group


def _make_nccl(store: Store, rank: int, world: int, timeout: datetime.timedelta) -> dist.ProcessGroupNCCL:
    """NCCL whose waits block and raise: its watchdog would end the process."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
        return dist.ProcessGroupNCCL(store, rank, world, options)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables that are set for the duration of a block."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
