"""One exchange with the other side, and how the receiver's tensor is made of the senders' pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import can_compare_in_one_pass
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import ExchangeFault, TransportFault
from sgl_comm.grafter.header import DTYPES, Header, read_frame
from sgl_comm.grafter.layouts import join
from sgl_comm.grafter.plan import Headers, Plan, make_plan
from sgl_comm.grafter.transforms import Transform, check_transformed
from sgl_comm.grafter.transport.connection import Connection
from sgl_comm.grafter.transport.deadline import Deadline
from sgl_comm.grafter.transport.handshake import Member


@dataclasses.dataclass(frozen=True)
class Received:
    """What a receiver got.

    Attributes:
        headers: those of all senders.
        pieces: the tensors of the plan's senders, in their order, on the receiver's device.
        totals: what the comparison is made of, where the tensor was compared while it was received. Then it is also
            in the receiver's tensor already, if it is to be written there.
    """

    headers: Headers
    pieces: Sequence[Tensor]
    totals: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Incoming:
    """The received tensor, ready to be compared and written.

    Attributes:
        tensor: row-major, of the shape, dtype and device of ``target``, unless it is skipped.
        target: the view of the receiver's tensor that it is for.
        skipped: why it is not used, where another dtype is configured to skip the tensor; else empty.
    """

    tensor: Tensor
    target: Tensor
    skipped: str = ""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one exchange did on this rank, ``me``; ``received`` is None on a sender and where the plan is to skip."""

    me: Member
    plan: Plan
    received: Received | None = None

    def incoming(self, value: Tensor, transform: Transform | None, own: Header, on_dtype: str) -> Incoming:
        """The received tensor for this rank's ``value``.

        Raises:
            ExchangeFault: the transform raised, or gave what does not fit.
        """
        assert self.received is not None
        pieces, plan, target = self.received.pieces, self.plan, value
        if transform is not None:
            tensor = self._transformed(self.received, value, transform, own)
            if tensor.dtype != value.dtype and on_dtype != "cast":
                skipped = f"the transform returned {tensor.dtype}; expected {value.dtype}"
                if on_dtype != "skip":
                    raise ExchangeFault(skipped)
                return Incoming(tensor, target, skipped)
        elif plan.full_shape is not None:
            full = join(pieces, [plan.parts[member] for member in plan.senders], plan.full_shape)
            part = plan.parts[self.me]
            tensor, target = part.of_full(full), part.of_local(value)
        else:
            tensor = pieces[0].view(value.shape)
        return Incoming(tensor.to(value.dtype).contiguous(), target)

    def _transformed(self, received: Received, value: Tensor, transform: Transform, own: Header) -> Tensor:
        extras = [received.headers[member].extras for member in self.plan.senders]
        tags = {"name": own.name, **own.tags}
        try:
            made = transform(
                pieces=list(received.pieces), extras=extras, direction=own.direction, rank=self.me.rank, tags=tags
            )
            return check_transformed(made, value.shape).to(value.device)
        except SglCommError as error:
            raise ExchangeFault(str(error)) from error
        except Exception as error:
            raise ExchangeFault(f"the transform raised {type(error).__name__}: {error}") from error


class Peer(Protocol):
    """Where a grafter's tensors go to and come from."""

    def exchange(self, own: Header, value: Tensor | None, sends: bool) -> Transfer:
        """Exchanges one tensor; ``value`` is None where this rank's header tells of a problem.

        Raises:
            ExchangeFault: the tensor cannot be exchanged; the next one may.
            TransportFault: nothing can be exchanged any more.
        """

    def close(self) -> None:
        """Ends all exchanges."""


class LivePeer:
    """The other side, while it runs. The first exchange connects to it."""

    def __init__(self, config: GrafterConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._connection: Connection | None = None
        self._staging: dict[torch.device, Tensor] = {}

    def exchange(self, own: Header, value: Tensor | None, sends: bool) -> Transfer:
        """Exchanges headers with the other side, then sends or receives as the plan says. Collective.

        Raises:
            ExchangeFault: the tensors do not go together; both sides know.
            TransportFault: the other side did not come or went away.
        """
        if self._connection is None:
            self._connection = Connection.open(self._config, self._rank)
        connection, deadline = self._connection, Deadline(self._config.timeout)
        headers = _exchange_headers(connection, own, deadline)
        role = {"b2t": "baseline", "t2b": "target"}[own.direction]
        senders = {member: header for member, header in headers.items() if member.role == role}
        plan = make_plan(senders, {member: header for member, header in headers.items() if member.role != role})
        me = connection.session.me
        if plan.skipped:
            return Transfer(me, plan)
        assert value is not None
        if sends:
            if me in plan.senders and value.numel():
                connection.channel_of(me).broadcast(value.resolve_conj().resolve_neg(), me, deadline)
            return Transfer(me, plan)
        if not connection.tensors:
            return Transfer(me, plan, self._receive_from_rank_i(connection, plan, senders, value, deadline))
        pieces = []
        for member in plan.senders:
            header = senders[member]
            piece = torch.empty(header.shape, dtype=DTYPES[header.dtype], device=value.device)
            if piece.numel():
                connection.channel_of(member).broadcast(piece, member, deadline)
            pieces.append(piece)
        return Transfer(me, plan, Received(senders, pieces))

    def _receive_from_rank_i(
        self, connection: Connection, plan: Plan, senders: Headers, value: Tensor, deadline: Deadline
    ) -> Received:
        (sender,) = plan.senders
        piece = self._staging_for(senders[sender], value.device)
        totals = None
        if can_compare_in_one_pass(value) and piece.dtype == value.dtype and piece.numel():
            ours, takes = value.resolve_neg().contiguous(), self._config.mode == "graft"
            totals = connection.headers.receive(piece, ours, takes, sender, deadline)
            if takes and ours.data_ptr() != value.data_ptr():
                value.copy_(ours)
        elif piece.numel():
            connection.headers.broadcast(piece, sender, deadline)
        return Received(senders, [piece], totals)

    def _staging_for(self, header: Header, device: torch.device) -> Tensor:
        """A buffer for a piece, kept for the next exchange, since new memory is slow."""
        dtype = DTYPES[header.dtype]
        num_bytes = torch.Size(header.shape).numel() * dtype.itemsize
        buffer = self._staging.get(device)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._staging[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return buffer[:num_bytes].view(dtype).view(header.shape)

    def close(self) -> None:
        """Closes the connection, which the other side notices."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._staging.clear()


def _exchange_headers(connection: Connection, own: Header, deadline: Deadline) -> dict[Member, Header]:
    frames = connection.headers.all_gather(own.frame(), deadline)
    headers = {}
    for member, frame in zip(connection.headers.members, frames, strict=True):
        try:
            headers[member] = read_frame(bytes(frame.numpy()))
        except SglCommError as error:
            raise TransportFault(f"{member} sent what is no header: {error}") from None
    return headers
