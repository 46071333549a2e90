"""The plan of an exchange: what the headers of both sides agree on.

A plan depends on the headers alone, which all ranks that take part have. So all of them make the same plan, and nobody
sends to a rank that does not receive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.faults import ExchangeFault
from sgl_comm.grafter.header import Header
from sgl_comm.grafter.layouts import Layout, Part, Shape, as_layout
from sgl_comm.grafter.transport.handshake import Member

BY_TRANSFORM = "transform"
"""What stands for a layout in the header of a receiver that has a transform."""

Headers = Mapping[Member, Header]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all ranks of an exchange will do.

    Attributes:
        senders: the ranks that send.
        skipped: why none of them does, where a difference is configured to skip the tensor; else empty.
        full_shape: the shape of the full tensor; None where there is no layout.
        parts: which part of the full tensor each rank has, of both sides; empty where there is no layout.
    """

    senders: tuple[Member, ...]
    skipped: str = ""
    full_shape: Shape | None = None
    parts: Mapping[Member, Part] = dataclasses.field(default_factory=dict)


def make_plan(senders: Headers, receivers: Headers) -> Plan:
    """The plan of one exchange, alike on all ranks that have the same headers.

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
    """Compares the dtypes. Returns why the tensor is skipped, where a difference is configured to; else empty."""
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
        elif math.prod(sent.shape) != math.prod(own.shape):
            raise ExchangeFault(f"{text}; expected as many elements (on_shape is cast)")
    return Plan((sender,), skipped)


def _plan_of_layouts(senders: Headers, receivers: Headers, skipped: str) -> Plan:
    layouts, full_shapes, parts = {}, {}, {}
    for role, side in (("sending", senders), ("receiving", receivers)):
        first = next(iter(side))
        texts = {header.layout for header in side.values()}
        if len(texts) != 1 or not (text := texts.pop()):
            given = ", ".join(f"{member} {header.layout or 'none'}" for member, header in side.items())
            raise ExchangeFault(f"got layouts {given}; expected one on all ranks of the {role} side")
        try:
            layout = as_layout(text)
            assert isinstance(layout, Layout)
            layouts[role] = layout
            full_shapes[role], found = layout.parts([header.shape for header in side.values()])
        except SglCommError as error:
            raise ExchangeFault(f"{first} and its side: {error}") from None
        parts.update(zip(side, found, strict=True))
    if full_shapes["sending"] != full_shapes["receiving"]:
        text = (
            f"got a full tensor of {list(full_shapes['sending'])} ({layouts['sending']}) from the sending side and of"
            f" {list(full_shapes['receiving'])} ({layouts['receiving']}) on the receiving side"
        )
        if any(header.on_shape != "skip" for header in receivers.values()):
            raise ExchangeFault(f"{text}; expected one (on_shape: skip would let it pass)")
        skipped = skipped or text
    members = list(senders)
    needed = tuple(members[index] for index in layouts["sending"].senders(len(members)))
    return Plan(needed, skipped, full_shapes["sending"], parts)
