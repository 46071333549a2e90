"""How long an exchange or a connection may take."""

from __future__ import annotations

import datetime
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from sgl_comm.grafter.faults import TransportFault

_T = TypeVar("_T")

_SLACK = 0.05
"""The share of the time that work may take longer, on a busy machine, before it is given up without a reason of its
own."""


class Deadline:
    """A moment that is ``seconds`` away."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends_at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; at least a millisecond, so that it can be a limit."""
        return max(1e-3, self._ends_at - time.monotonic())

    def left_as_timedelta(self) -> datetime.timedelta:
        """``left`` as torch's timeouts take it."""
        return datetime.timedelta(seconds=self.left())

    def over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._ends_at


def run_until(deadline: Deadline, what: str, work: Callable[[], _T], undo: Callable[[_T], None]) -> _T:
    """Runs ``work`` in a thread of its own and gives up at the deadline, since torch's waits may outlast their timeout.

    Raises:
        TransportFault: the deadline passed; the thread goes on, and what it makes is undone.
    """
    lock = threading.Lock()
    made: list[_T] = []
    errors: list[BaseException] = []
    abandoned = False

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            errors.append(error)
            return
        with lock:
            if not abandoned:
                made.append(result)
                return
        undo(result)

    thread = threading.Thread(target=run, name="sgl_comm-grafter", daemon=True)
    thread.start()
    try:
        # A little longer than the work's own waits, whose errors say more.
        thread.join(deadline.left() + _SLACK * deadline.seconds)
    except BaseException:  # an interrupt
        with lock:
            abandoned = True
        for result in made:
            undo(result)
        raise
    with lock:
        abandoned = True
    if errors:
        error = errors.pop()
        _release_frames(error)
        raise error
    if not made:
        raise TransportFault(f"{what} took longer than {deadline.seconds:g} s (timeout)")
    return made[0]


def _release_frames(error: BaseException | None) -> None:
    """Drops what the frames hold in which the error went up: a store's port is free once nobody has the store."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
