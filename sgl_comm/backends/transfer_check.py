"""Whether bytes really pass between the ranks' GPUs: a driver may grant peer access that then loses or hangs writes.

Each rank starts a child process (``transfer_child.py``) that shares memory by CUDA IPC with the others' children,
writes into theirs, and looks at what arrived. A crash, a hang or an error in the driver is the child's; for the rank it
is a reason. Parent and child speak in lines: "open HANDLES", "verify", "close" one way, "handle", "written",
"verified", "closed", each once, or "error TEXT" the other way. Between two lines all ranks agree.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sgl_comm.backends.rendezvous import Rendezvous

DEADLINE_S = 30.0
"""How long a child may take for all it does; it is killed then."""

_SCRIPT = Path(__file__).with_name("transfer_child.py")
_KNOWN = "="

_verdicts: dict[tuple[str, ...], str] = {}
"""UUIDs of a group's devices in rank order -> what the check said in this process."""


def check(rendezvous: Rendezvous, uuids: Sequence[str], skip_one_device: bool = True) -> str:
    """Why data cannot pass between the ranks' GPUs, alike on all ranks; empty if it can. A collective call.

    Args:
        rendezvous: the group.
        uuids: every rank's device, in rank order.
        skip_one_device: whether nothing is tried where all ranks share a device, and so no link is used.

    What is known of these devices is not tried again, if all ranks know it.
    """
    key = tuple(uuids)
    if rendezvous.world == 1 or (skip_one_device and len(set(key)) == 1):
        return ""
    known = rendezvous.texts(_KNOWN + _verdicts[key] if key in _verdicts else "")
    if all(known):
        return next((text for text in (text.removeprefix(_KNOWN) for text in known) if text), "")
    child = _Child(uuids[rendezvous.rank], rendezvous.rank, time.monotonic() + DEADLINE_S)
    try:
        _verdicts[key] = _run(rendezvous, child)
    finally:
        child.kill()
    return _verdicts[key]


def _run(rendezvous: Rendezvous, child: _Child) -> str:
    handle, problem = _attempt(child, "", "handle")
    failed = rendezvous.agree(problem)
    if failed:
        return failed
    handles = " ".join(rendezvous.texts(handle))
    for line, answer in ((f"open {handles}", "written"), ("verify", "verified"), ("close", "closed")):
        failed = rendezvous.agree(_attempt(child, line, answer)[1])
        if failed:
            return failed
    return ""


def _attempt(child: _Child, line: str, answer: str) -> tuple[str, str]:
    """What the child says to the line, and why it does not say what it should, or an empty text."""
    try:
        return child.ask(line, answer), ""
    except Exception as error:
        return "", f"the transfer check between the GPUs failed: {error}"


class _Child:
    """The child process of this rank; started when first asked."""

    def __init__(self, uuid: str, rank: int, ends_at: float) -> None:
        self._command = [sys.executable, "-I", "-S", str(_SCRIPT), uuid, str(rank), f"{DEADLINE_S:g}"]
        self._ends_at = ends_at
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""

    def ask(self, line: str, answer: str) -> str:
        """Sends the line, if there is one, and returns what follows the expected word of the child's answer.

        Raises:
            RuntimeError: the child says something else, ends, or does not answer in time.
            OSError: it cannot be started or spoken to.
        """
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        assert self._process.stdin is not None
        if line:
            with suppress(BrokenPipeError):  # one that has ended is found below, with its last words
                os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        other = ""
        while (heard := self._line()) is not None:
            word, _, rest = heard.partition(" ")
            if word == answer:
                return rest
            if word == "error":
                raise RuntimeError(rest)
            other = heard or other
        code = self._process.wait()
        raise RuntimeError(
            f"its process ended with status {code} before it had {answer!r}" + f" ({other})" * bool(other)
        )

    def kill(self) -> None:
        """Ends the child, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # a process that a driver holds on to stays behind
            self._process.wait(1.0)

    def _line(self) -> str | None:
        """The child's next line; None when it has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._heard:
            left = self._ends_at - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise RuntimeError(f"no answer within {DEADLINE_S:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode(errors="replace")
