"""How the ranks of two systems meet: a store of their own, a token, and who is who.

Rank 0 of the baseline listens at the given address, on a socket made here, since torch's ``TCPStore`` by itself listens
on every interface. Each rank proves that it knows the token by an HMAC (RFC 2104, SHA-256) over what it says and a
number that rank 0 has drawn; rank 0 answers all of them with a verdict, proved the same way. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import hmac
import json
import logging
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import Deadline, TransportFault

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_PROTOCOL = 1
_RETRY_S = 0.05
_MAC_DIGITS = 64
_FAREWELL_S = 5.0

_SHARE_OF_HELLOS = 0.95
"""Rank 0 tells the others who is missing before their own time is up."""

_SHARE_OF_VERDICT = 0.975
"""They began earlier, maybe: then they look for themselves."""

_SLACK = 0.05
"""How much of the time more a meeting may take, on a machine that is busy, before it is given up without a reason."""


@dataclass(frozen=True)
class Member:
    """One of the ranks that meet: ``index`` counts the baseline's first, then the target's."""

    index: int
    role: str
    rank: int

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank}"


@dataclass(frozen=True)
class Meeting:
    """All ranks of both sides, and the store over which they make their groups.

    ``gathers``: whether either side has a layout or a transform. ``address``: this host's own, by which it reaches the
    baseline's rank 0.
    """

    members: tuple[Member, ...]
    me: Member
    store: Store
    address: str
    gathers: bool

    def side(self, role: str) -> list[Member]:
        """The ranks of one side."""
        return [member for member in self.members if member.role == role]


def within(deadline: Deadline, what: str, work: Callable[[], _T], undo: Callable[[_T], None]) -> _T:
    """Runs ``work`` in a thread of its own, and gives up at the deadline: torch's own waits may last longer than told.

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
        _let_go(error)
        raise error
    if not made:
        raise TransportFault(f"{what} took longer than {deadline.seconds:g} s (timeout)")
    return made[0]


def _let_go(error: BaseException | None) -> None:
    """Of what the frames hold in which the error went up: a store's port is free once nobody has the store."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def meet(config: GrafterConfig, rank: int, deadline: Deadline) -> Meeting:
    """Waits until every rank of both sides is there and has shown that it knows the token.

    Raises:
        TransportFault: a rank did not come in time, has another token or other numbers of ranks, or no store.
    """
    baseline, target = config.baseline_world_size, config.target_world_size
    assert baseline is not None
    assert target is not None
    members = tuple(
        Member(index, "baseline" if index < baseline else "target", index if index < baseline else index - baseline)
        for index in range(baseline + target)
    )
    me = members[rank if config.role == "baseline" else baseline + rank]
    root, address = _open_store(config, me.index == 0, deadline)
    talk = _Talk(PrefixStore(f"sgl_comm/grafter/{config.group_name}", root), config, members, me, deadline)
    hellos = talk.agree()
    secret = talk.proof("store", json.dumps(hellos))
    return Meeting(
        members, me, PrefixStore(f"sgl_comm/grafter/{secret}", root), address, any(hello["gathers"] for hello in hellos)
    )


def _open_store(config: GrafterConfig, is_master: bool, deadline: Deadline) -> tuple[Store, str]:
    host, port = config.master_address, config.master_port
    assert port is not None
    where = f"{host}:{port}"
    descriptor = _listen(host, port) if is_master else None
    local = host if is_master else _reach(host, port, deadline)
    try:
        store = TCPStore(
            host,
            port,
            is_master=is_master,
            timeout=_delta(deadline),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
    except (RuntimeError, ValueError) as error:
        raise TransportFault(f"no store at {where} (master_address, master_port): {_first_line(error)}") from None
    return store, local


def _listen(host: str, port: int) -> int:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        taken = "; expected a master_port that is free" if error.errno == errno.EADDRINUSE else ""
        raise TransportFault(f"cannot listen at {host}:{port} ({error.strerror or error}){taken}") from None
    return listener.detach()


def _reach(host: str, port: int, deadline: Deadline) -> str:
    """Waits until somebody listens there, and returns this host's address on the way to it."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=deadline.left()) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if deadline.over():
                raise TransportFault(
                    f"baseline rank 0 did not come within {deadline.seconds:g} s (timeout): nobody listens at"
                    f" {host}:{port} ({error.strerror or error})"
                ) from None
            time.sleep(min(_RETRY_S, deadline.left()))


class _Talk:
    """What the ranks say to each other over the store before any group is made."""

    def __init__(
        self, store: Store, config: GrafterConfig, members: tuple[Member, ...], me: Member, deadline: Deadline
    ) -> None:
        self.store, self.config, self.members, self.me, self.deadline = store, config, members, me, deadline
        self.challenge = ""

    def proof(self, what: str, text: str) -> str:
        """What only one who knows the token can make of a text."""
        message = f"{self.challenge}|{what}|{text}".encode()
        return hmac.new(self.config.token.encode(), message, hashlib.sha256).hexdigest()

    def agree(self) -> list[dict[str, Any]]:
        """Everybody's hello, once rank 0 has found all of them good."""
        leads = self.me.index == 0
        if leads:
            self.challenge = secrets.token_hex(16)
            self.store.set("challenge", self.challenge)
        else:
            self.challenge = self._get("challenge", self.members[0])
        mine = self._say_hello()
        if leads:
            self._decide()
        verdict = self._get("verdict", None, _SHARE_OF_VERDICT)
        self.store.set(f"bye/{self.me.index}", "1")
        if leads:
            self._wait_for_the_others()
        # That this hello, whose nonce is new, is in it shows that the verdict is of this meeting.
        said = json.loads(self._proved("verdict", verdict, self.members[0]))
        if said["reason"]:
            raise TransportFault(said["reason"])
        if said["hellos"][self.me.index] != mine:
            raise TransportFault("baseline rank 0 gave the verdict of another meeting; expected this one's")
        return said["hellos"]

    def _proved(self, what: str, said: str, member: Member) -> str:
        """What somebody has said, without its proof.

        Raises:
            TransportFault: the proof is none.
        """
        proof, text = said[:_MAC_DIGITS], said[_MAC_DIGITS:]
        if not hmac.compare_digest(proof.encode(), self.proof(what, text).encode()):
            raise TransportFault(
                f"{member} has another token than {self.me} (token, SGLCOMM_GRAFTER_TOKEN); expected one on both sides"
            )
        return text

    def _say_hello(self) -> dict[str, Any]:
        config = self.config
        hello = {
            "protocol": _PROTOCOL,
            "member": str(self.me),
            "worlds": [config.baseline_world_size, config.target_world_size],
            "backend": config.backend,
            "gathers": config.gathers,
            "nonce": secrets.token_hex(16),
        }
        text = json.dumps(hello)
        mine = self.proof("hello", text) + text
        key = f"hello/{self.me.index}"
        self.store.compare_set(key, "", mine)
        if self._get(key, self.me) != mine:
            raise TransportFault(f"another process has come as {self.me}; expected one (rank)")
        return hello

    def _decide(self) -> None:
        """Rank 0 reads every hello and says what is wrong, if anything is."""
        hellos: list[dict[str, Any]] = []
        reason = ""
        try:
            for member in self.members:
                hello = self._get(f"hello/{member.index}", member, _SHARE_OF_HELLOS)
                hellos.append(json.loads(self._proved("hello", hello, member)))
                if hellos[-1]["member"] != str(member):
                    raise TransportFault(f"{hellos[-1]['member']} has come as {member}; expected itself")
            for what in ("protocol", "worlds", "backend"):
                for member, hello in zip(self.members, hellos, strict=True):
                    if hello[what] != hellos[0][what]:
                        raise TransportFault(
                            f"{member} has {what} {hello[what]} and baseline rank 0 {hellos[0][what]}; expected one"
                        )
        except SglCommError as error:
            reason = str(error)
        text = json.dumps({"reason": reason, "hellos": hellos})
        self.store.set("verdict", self.proof("verdict", text) + text)

    def _get(self, key: str, member: Member | None, share: float = 1.0) -> str:
        """What a member has put there (none: once all have come), for which that share of the time is waited."""
        left = max(1e-3, self.deadline.left() - (1 - share) * self.deadline.seconds)
        self.store.set_timeout(datetime.timedelta(seconds=left))
        start = time.monotonic()
        try:
            return self.store.get(key).decode(errors="replace")
        except RuntimeError as error:
            if time.monotonic() - start >= left:
                member = member or self._missing()
                raise TransportFault(f"{member} did not come within {self.deadline.seconds:g} s (timeout)") from None
            raise TransportFault(f"the store at {self.config.master_address} is gone: {_first_line(error)}") from None

    def _missing(self) -> Member:
        """The first who has said no hello; the baseline's rank 0, if all have or nothing can be found out."""
        with contextlib.suppress(RuntimeError):
            return next((member for member in self.members if not self._has_come(member)), self.members[0])
        return self.members[0]

    def _has_come(self, member: Member) -> bool:
        """Whether it has said its hello."""
        return bool(self.store.check([f"hello/{member.index}"]))

    def _wait_for_the_others(self) -> None:
        """The store ends with rank 0's process, which must not be before all who came have read the verdict."""
        self.store.set_timeout(datetime.timedelta(seconds=min(_FAREWELL_S, self.deadline.left())))
        try:
            self.store.wait([f"bye/{member.index}" for member in self.members if self._has_come(member)])
        except RuntimeError:
            logger.debug("sgl_comm: grafter: not every rank has read the verdict")


def _delta(deadline: Deadline) -> datetime.timedelta:
    return datetime.timedelta(seconds=deadline.left())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
