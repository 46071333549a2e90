"""One exchange: what the headers of both sides agree on, and how the receiver's tensor comes of the senders' pieces.

What can be is decided by the headers alone, which all ranks that take part have, so that all of them draw one verdict
and nobody sends to one who does not receive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import can_compare_in_one_pass
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import Deadline, ExchangeFault, TransportFault
from sgl_comm.grafter.header import DTYPES, Header, read_frame
from sgl_comm.grafter.link import Link
from sgl_comm.grafter.meeting import Member
from sgl_comm.grafter.transforms import Layout, Part, Shape, Transform, as_layout, checked, join

BY_TRANSFORM = "transform"
"""What stands for a layout in the header of a receiver that has a transform."""

Headers = Mapping[Member, Header]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all ranks will do: which senders send, and where their pieces and the receivers' lie in the whole.

    ``skipped`` says why nobody sends, where that is configured; ``whole`` is None where there is no layout.
    """

    senders: tuple[Member, ...]
    skipped: str = ""
    whole: Shape | None = None
    parts: Mapping[Member, Part] = dataclasses.field(default_factory=dict)


def make_plan(senders: Headers, receivers: Headers) -> Plan:
    """The verdict of one exchange.

    Raises:
        ExchangeFault: a rank cannot take part, the sides are out of step, or their tensors do not go together.
    """
    everyone = {**senders, **receivers}
    for member, header in everyone.items():
        if header.problem:
            raise ExchangeFault(f"{member}: {header.problem}")
    first = next(iter(senders))
    for member, header in everyone.items():
        if _identity(header) != _identity(senders[first]):
            raise ExchangeFault(
                f"out of step: {first} has {senders[first]}, {member} has {header}; expected one tensor on both sides"
            )
    by_transform = [member for member, header in receivers.items() if header.layout == BY_TRANSFORM]
    if len(by_transform) == len(receivers):
        return Plan(tuple(senders))
    if by_transform:
        without = next(member for member in receivers if member not in by_transform)
        raise ExchangeFault(f"{by_transform[0]} has a transform and {without} none; expected one on all of that side")
    skipped = _check_dtypes(senders, receivers)
    if not any(header.layout for header in everyone.values()):
        return _plan_of_pair(senders, receivers, skipped)
    return _plan_of_layouts(senders, receivers, skipped)


def _identity(header: Header) -> tuple[object, ...]:
    return header.sequence, header.direction, header.name, header.tags


def _check_dtypes(senders: Headers, receivers: Headers) -> str:
    """Returns why nobody sends, if that is configured."""
    first, dtype = next((member, header.dtype) for member, header in senders.items())
    for member, header in senders.items():
        if header.dtype != dtype:
            raise ExchangeFault(
                f"got dtype {dtype} from {first} and {header.dtype} from {member}; expected one on the sending side"
            )
    for member, header in receivers.items():
        if header.dtype != dtype and header.on_dtype != "cast":
            text = f"got dtype {dtype} from {first} and {header.dtype} on {member}"
            if header.on_dtype == "skip":
                return text
            raise ExchangeFault(f"{text}; expected one (on_dtype: cast or skip would let it pass)")
    return ""


def _plan_of_pair(senders: Headers, receivers: Headers, skipped: str) -> Plan:
    (sender, sent), (receiver, own) = next(iter(senders.items())), next(iter(receivers.items()))
    if len(senders) > 1 or len(receivers) > 1:
        raise ExchangeFault(
            f"got neither a layout nor a transform on {receiver} and its side, though a side has one; expected a layout"
            " on both sides, or a transform on the receiving one"
        )
    if sent.shape != own.shape:
        text = f"got shape {list(sent.shape)} from {sender} and {list(own.shape)} on {receiver}"
        if own.on_shape == "skip":
            skipped = skipped or text
        elif own.on_shape == "error":
            raise ExchangeFault(f"{text}; expected one (on_shape: cast or skip would let it pass)")
        elif _numel(sent.shape) != _numel(own.shape):
            raise ExchangeFault(f"{text}; expected as many elements (on_shape is cast)")
    return Plan((sender,), skipped)


def _plan_of_layouts(senders: Headers, receivers: Headers, skipped: str) -> Plan:
    layouts, wholes, parts = {}, {}, {}
    for role, side in (("sending", senders), ("receiving", receivers)):
        first = next(iter(side))
        texts = {header.layout for header in side.values()}
        if len(texts) != 1 or not (text := texts.pop()):
            said = ", ".join(f"{member} {header.layout or 'none'}" for member, header in side.items())
            raise ExchangeFault(f"got layouts {said}; expected one on all ranks of the {role} side")
        try:
            layout = as_layout(text)
            assert isinstance(layout, Layout)
            layouts[role] = layout
            wholes[role], found = layout.parts([header.shape for header in side.values()])
        except SglCommError as error:
            raise ExchangeFault(f"{first} and its side: {error}") from None
        parts.update(zip(side, found, strict=True))
    if wholes["sending"] != wholes["receiving"]:
        text = (
            f"got a whole of {list(wholes['sending'])} ({layouts['sending']}) from the sending side and of"
            f" {list(wholes['receiving'])} ({layouts['receiving']}) on the receiving side"
        )
        if any(header.on_shape != "skip" for header in receivers.values()):
            raise ExchangeFault(f"{text}; expected one (on_shape: skip would let it pass)")
        skipped = skipped or text
    members = list(senders)
    needed = tuple(members[index] for index in layouts["sending"].senders(len(members)))
    return Plan(needed, skipped, wholes["sending"], parts)


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What a receiver got: the pieces of the plan's senders, in their order, on the receiver's device.

    Where ``totals`` are there the tensor has been compared on the way, and taken if it was to be.
    """

    plan: Plan
    senders: Headers
    pieces: Sequence[Tensor]
    totals: Tensor | None = None

    def place(
        self, me: Member, value: Tensor, transform: Transform | None, own: Header, on_dtype: str
    ) -> tuple[Tensor, Tensor] | str:
        """The received tensor, row-major, and the view of ``value`` that it belongs into, both of one shape and dtype;
        or why it is skipped.

        Raises:
            ExchangeFault: the transform raised, or gave what does not fit.
        """
        target = value
        if transform is not None:
            incoming = self._transformed(me, value, transform, own)
            if incoming.dtype != value.dtype and on_dtype != "cast":
                text = f"the transform returned {incoming.dtype}; expected {value.dtype}"
                if on_dtype == "skip":
                    return text
                raise ExchangeFault(text)
        elif self.plan.whole is not None:
            sent = [self.plan.parts[member] for member in self.plan.senders]
            part = self.plan.parts[me]
            incoming, target = part.of_whole(join(self.pieces, sent, self.plan.whole)), part.of_rank(value)
        else:
            incoming = self.pieces[0].view(value.shape)
        return incoming.to(value.dtype).contiguous(), target

    def _transformed(self, me: Member, value: Tensor, transform: Transform, own: Header) -> Tensor:
        extras = [self.senders[member].extras for member in self.plan.senders]
        tags = {"name": own.name, **own.tags}
        try:
            made = transform(pieces=list(self.pieces), extras=extras, direction=own.direction, rank=me.rank, tags=tags)
            return checked(made, value.shape).to(value.device)
        except Exception as error:
            said = (
                str(error)
                if isinstance(error, SglCommError)
                else f"the transform raised {type(error).__name__}: {error}"
            )
            raise ExchangeFault(said) from error


class LivePeer:
    """The other side, while it runs. Meets it in the first exchange."""

    def __init__(self, config: GrafterConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._link: Link | None = None
        self._scratch: dict[torch.device, Tensor] = {}

    def exchange(self, mine: Header, value: Tensor | None, sends: bool) -> tuple[Member, Delivery | Plan]:
        """Tells the other side what is here, and sends or receives. Collective.

        Returns:
            Who this rank is, and on a receiver what came, on a sender (or where it was skipped) the plan.

        Raises:
            ExchangeFault: the tensors do not go together; both sides know.
            TransportFault: the other side did not come or went away.
        """
        if self._link is None:
            self._link = Link.open(self._config, self._rank)
        link, deadline = self._link, Deadline(self._config.timeout)
        headers = _read_headers(link, mine, deadline)
        role = {"b2t": "baseline", "t2b": "target"}[mine.direction]
        senders = {member: header for member, header in headers.items() if member.role == role}
        plan = make_plan(senders, {member: header for member, header in headers.items() if member.role != role})
        me = link.meeting.me
        if plan.skipped:
            return me, plan
        if sends:
            assert value is not None
            if me in plan.senders and value.numel():
                link.channel_of(me).broadcast(value.resolve_conj().resolve_neg(), me, deadline)
            return me, plan
        assert value is not None
        if not link.stars:
            return me, self._receive_from_rank_i(link, plan, senders, value, deadline)
        pieces = []
        for member in plan.senders:
            header = senders[member]
            piece = torch.empty(header.shape, dtype=DTYPES[header.dtype], device=value.device)
            if piece.numel():
                link.channel_of(member).broadcast(piece, member, deadline)
            pieces.append(piece)
        return me, Delivery(plan, senders, pieces)

    def _receive_from_rank_i(
        self, link: Link, plan: Plan, senders: Headers, value: Tensor, deadline: Deadline
    ) -> Delivery:
        (sender,) = plan.senders
        piece = self._room_for(senders[sender], value.device)
        totals = None
        if can_compare_in_one_pass(value) and piece.dtype == value.dtype and piece.numel():
            ours, takes = value.resolve_neg().contiguous(), self._config.mode == "graft"
            totals = link.headers.receive(piece, ours, takes, sender, deadline)
            if takes and ours.data_ptr() != value.data_ptr():
                value.copy_(ours)
        elif piece.numel():
            link.headers.broadcast(piece, sender, deadline)
        return Delivery(plan, senders, [piece], totals)

    def _room_for(self, header: Header, device: torch.device) -> Tensor:
        """Memory for a piece, the same again and again, since new memory is slow."""
        dtype = DTYPES[header.dtype]
        num_bytes = _numel(header.shape) * dtype.itemsize
        room = self._scratch.get(device)
        if room is None or room.numel() < num_bytes:
            room = self._scratch[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return room[:num_bytes].view(dtype).view(header.shape)

    def close(self) -> None:
        """Leaves the other side, which sees it."""
        if self._link is not None:
            self._link.close()
            self._link = None
        self._scratch.clear()


def _read_headers(link: Link, mine: Header, deadline: Deadline) -> dict[Member, Header]:
    frames = link.headers.all_gather(mine.frame(), deadline)
    headers = {}
    for member, frame in zip(link.headers.members, frames, strict=True):
        try:
            headers[member] = read_frame(bytes(frame.numpy()))
        except SglCommError as error:
            raise TransportFault(f"{member} sent what is no header: {error}") from None
    return headers
