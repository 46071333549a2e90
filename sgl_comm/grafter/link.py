"""The groups of both sides together, and the one way in which tensors pass through them.

Where tensors go from rank i to rank i there is a group of these two; else one of all ranks for the headers, and for
every rank one of it and the whole other side, in which it sends.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store

from sgl_comm import ops as sgl_ops
from sgl_comm.backends.capability import why_not_world_size
from sgl_comm.errors import SglCommError
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import Deadline, TransportFault
from sgl_comm.grafter.meeting import Meeting, Member, meet, within

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ops = torch.ops.sgl_comm


class Channel:
    """A group of ranks by a name that ``torch.ops.sgl_comm`` knows.

    Collective. The members' own backend is gloo, with NCCL for CUDA tensors where that is wanted; or shared memory,
    which needs no group of torch's.
    """

    def __init__(
        self, key: str, name: str, members: Sequence[Member], meeting: Meeting, backend: str, deadline: Deadline
    ) -> None:
        self.name, self.members = name, tuple(members)
        self.rank = self.members.index(meeting.me)
        self._group: ProcessGroup | None = None
        _ops._shm_open(self.name, self.rank, len(members), False)
        try:
            store = PrefixStore(key, meeting.store)
            reason = self._share_memory(store, deadline) if backend == "shm" else "not wanted"
            if reason:
                if backend == "shm" and self.rank == 0:
                    logger.warning("sgl_comm: grafter: gloo carries %s, since shared memory cannot: %s", key, reason)
                self._make_group(store, meeting.address, backend, deadline)
            _ops._shm_settle(self.name, not reason)
        except BaseException:
            self.close()
            raise

    def index_of(self, member: Member) -> int:
        """The rank inside this group."""
        return self.members.index(member)

    def all_gather(self, frame: Tensor, deadline: Deadline) -> Tensor:
        """Every member's bytes, a row each."""
        return self._bounded(deadline, lambda: sgl_ops.all_gather(frame.unsqueeze(0), self.name))

    def broadcast(self, tensor: Tensor, source: Member, deadline: Deadline) -> None:
        """``source``'s tensor into the others'."""
        self._bounded(deadline, lambda: sgl_ops.grafter_broadcast_(tensor, self.index_of(source), self.name))

    def receive(self, staging: Tensor, ours: Tensor, take: bool, source: Member, deadline: Deadline) -> Tensor:
        """``broadcast`` into ``staging`` on a receiver, and what ``_grafter_compare`` gives of it and ``ours``.

        Both are alike, row-major and of the CPU. With ``take`` ours becomes theirs, when everything has come.
        """
        args = (staging, ours, take, self.index_of(source), self.name)
        return self._bounded(deadline, lambda: _ops._grafter_receive_(*args))

    def close(self) -> None:
        """Gives the name and the memory up."""
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
        """Returns why it cannot be used, alike on every member; empty if it can."""
        unserved = why_not_world_size(len(self.members))
        if unserved:
            return unserved
        handle = _ops._shm_publish(self.name, deadline.left(), 0)
        handles = b"".join(self._told(store, "handle", bytes(handle.tolist()), deadline))
        reason = _ops._shm_attach(self.name, torch.frombuffer(bytearray(handles), dtype=torch.uint8))
        reasons = self._told(store, "reason", reason.encode(), deadline)
        return next((text.decode() for text in reasons if text), "")

    def _told(self, store: Store, what: str, mine: bytes, deadline: Deadline) -> list[bytes]:
        store.set_timeout(datetime.timedelta(seconds=deadline.left()))
        store.set(f"{what}/{self.rank}", b"." + mine)  # a store takes no empty values
        return [store.get(f"{what}/{rank}")[1:] for rank in range(len(self.members))]

    def _make_group(self, store: Store, address: str, backend: str, deadline: Deadline) -> None:
        world, kinds = len(self.members), ProcessGroup.BackendType
        group = ProcessGroup(store, self.rank, world)
        timeout = datetime.timedelta(seconds=deadline.left())
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


@dataclass(frozen=True)
class Link:
    """All channels of this rank. Made by ``open``, once both sides have met."""

    meeting: Meeting
    headers: Channel
    """Where this rank's headers go, and its tensors too where they go from rank i to rank i."""
    stars: dict[Member, Channel]
    """Sender -> the group of it and all ranks of the other side; empty where tensors go from rank i to rank i."""

    @staticmethod
    def open(config: GrafterConfig, rank: int) -> Link:
        """Meets the other side and makes the groups, within ``config.timeout``. Collective among both sides.

        Raises:
            TransportFault: the other side did not come, or cannot be met.
        """
        deadline = Deadline(config.timeout)
        return within(deadline, "meeting the other side", lambda: Link._open(config, rank, deadline), Link.close)

    @staticmethod
    def _open(config: GrafterConfig, rank: int, deadline: Deadline) -> Link:
        meeting = meet(config, rank, deadline)
        me = meeting.me
        made: list[Channel] = []

        def channel(key: str, members: Sequence[Member]) -> Channel:
            name = f"{config.group_name}:{config.master_port}/{key}/{me.index}"
            made.append(Channel(key, name, members, meeting, config.backend, deadline))
            return made[-1]

        try:
            if not meeting.gathers:
                pair = [meeting.side(role)[rank] for role in ("baseline", "target")]
                return Link(meeting, channel(f"pair{rank}", pair), {})
            headers = channel("all", meeting.members)
            stars = {}
            for sender in meeting.members:
                others = [member for member in meeting.members if member.role != sender.role]
                if me == sender or me in others:
                    stars[sender] = channel(f"from{sender.index}", [sender, *others])
            return Link(meeting, headers, stars)
        except BaseException as error:
            for each in made:
                each.close()
            if isinstance(error, RuntimeError) and not isinstance(error, TransportFault):
                why = str(error).splitlines()[0]
                raise TransportFault(f"the groups of both sides could not be made: {why}") from None
            raise

    def channel_of(self, sender: Member) -> Channel:
        """In which a rank sends."""
        return self.stars[sender] if self.stars else self.headers

    def close(self) -> None:
        """Closes all channels."""
        for channel in (self.headers, *self.stars.values()):
            channel.close()
