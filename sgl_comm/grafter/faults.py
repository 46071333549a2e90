"""What can go wrong in an exchange, by what becomes of the grafter; and how long one may take."""

from __future__ import annotations

import time

from sgl_comm.errors import SglCommError


class ExchangeFault(SglCommError):
    """This exchange cannot be; the two sides are in step still, and the next one may."""


class TransportFault(SglCommError):
    """The other side is not there, or cannot be reached: the grafter is off from here on."""


class Deadline:
    """A moment that is ``seconds`` away."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends_at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; at least a millisecond, so that it can be a limit."""
        return max(1e-3, self._ends_at - time.monotonic())

    def over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._ends_at
