"""What can go wrong in an exchange, by what becomes of the grafter."""

from __future__ import annotations

from sgl_comm.errors import SglCommError


class ExchangeFault(SglCommError):
    """This exchange cannot be made; the two sides are in step still, and the next one may succeed."""


class TransportFault(SglCommError):
    """The other side is not there, or cannot be reached: the grafter is off from here on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
