"""The handshake of two systems: every rank proves that it knows the token, and learns who the others are.

Each rank sends an HMAC (RFC 2104, SHA-256) over what it says and a number that the baseline's rank 0 has drawn. Rank 0
answers all of them with a verdict, which has an HMAC too. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

from torch.distributed import PrefixStore, Store

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import TransportFault, first_line
from sgl_comm.grafter.transport.deadline import Deadline
from sgl_comm.grafter.transport.store import open_store

logger = logging.getLogger(__name__)

_PROTOCOL = 1
_HMAC_DIGITS = 64
_BYE_TIMEOUT_S = 5.0

_SHARE_OF_HELLOS = 0.95
"""The share of the time for which rank 0 waits for hellos, so that the others hear who is missing before their own time
is up."""

_SHARE_OF_VERDICT = 0.975
"""The share of the time for which the others wait for the verdict. Their time may be up before rank 0's, if they began
earlier; then they find out themselves who is missing."""


@dataclass(frozen=True)
class Member:
    """A rank of either side: ``index`` counts the baseline's first, then the target's."""

    index: int
    role: str
    rank: int

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank}"


@dataclass(frozen=True)
class Session:
    """What a handshake gives: all ranks of both sides, and the store over which they make their groups.

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


def handshake(config: GrafterConfig, rank: int, deadline: Deadline) -> Session:
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
    root, address = open_store(config, me.index == 0, deadline)
    store = PrefixStore(f"sgl_comm/grafter/{config.group_name}", root)
    protocol = _Handshake(store, config, members, me, deadline)
    hellos = protocol.run()
    secret = protocol.hmac_of("store", json.dumps(hellos))
    return Session(
        members, me, PrefixStore(f"sgl_comm/grafter/{secret}", root), address, any(hello["gathers"] for hello in hellos)
    )


class _Handshake:
    """One rank's side of the handshake, over the store."""

    def __init__(
        self, store: Store, config: GrafterConfig, members: tuple[Member, ...], me: Member, deadline: Deadline
    ) -> None:
        self.store, self.config, self.members, self.me, self.deadline = store, config, members, me, deadline
        self.challenge = ""

    def hmac_of(self, what: str, text: str) -> str:
        """The HMAC of a text, which only a rank that knows the token can compute."""
        message = f"{self.challenge}|{what}|{text}".encode()
        return hmac.new(self.config.token.encode(), message, hashlib.sha256).hexdigest()

    def run(self) -> list[dict[str, Any]]:
        """All ranks' hellos, once rank 0 has accepted them."""
        is_first = self.me.index == 0
        if is_first:
            self.challenge = secrets.token_hex(16)
            self.store.set("challenge", self.challenge)
        else:
            self.challenge = self._get("challenge", self.members[0])
        mine = self._send_hello()
        if is_first:
            self._send_verdict()
        verdict = self._get("verdict", None, _SHARE_OF_VERDICT)
        self.store.set(f"bye/{self.me.index}", "1")
        if is_first:
            self._wait_for_byes()
        fields = json.loads(self._verified("verdict", verdict, self.members[0]))
        if fields["reason"]:
            raise TransportFault(fields["reason"])
        # This hello has a new nonce, so that only a verdict of this handshake can have it.
        if fields["hellos"][self.me.index] != mine:
            raise TransportFault("baseline rank 0 gave the verdict of another handshake; expected this one's")
        return fields["hellos"]

    def _verified(self, what: str, signed: str, member: Member) -> str:
        """The text that ``member`` has sent after its HMAC.

        Raises:
            TransportFault: the HMAC is not that of the text.
        """
        digest, text = signed[:_HMAC_DIGITS], signed[_HMAC_DIGITS:]
        if not hmac.compare_digest(digest.encode(), self.hmac_of(what, text).encode()):
            raise TransportFault(
                f"{member} has another token than {self.me} (token, SGLCOMM_GRAFTER_TOKEN); expected one on both sides"
            )
        return text

    def _send_hello(self) -> dict[str, Any]:
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
        mine = self.hmac_of("hello", text) + text
        key = f"hello/{self.me.index}"
        self.store.compare_set(key, "", mine)
        if self._get(key, self.me) != mine:
            raise TransportFault(f"another process has come as {self.me}; expected one (rank)")
        return hello

    def _send_verdict(self) -> None:
        """Rank 0 reads every hello and answers with all of them, and with what is wrong, if anything is."""
        hellos: list[dict[str, Any]] = []
        reason = ""
        try:
            for member in self.members:
                hello = self._get(f"hello/{member.index}", member, _SHARE_OF_HELLOS)
                hellos.append(json.loads(self._verified("hello", hello, member)))
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
        self.store.set("verdict", self.hmac_of("verdict", text) + text)

    def _get(self, key: str, member: Member | None, share: float = 1.0) -> str:
        """The value of a key, for which ``share`` of the time is waited.

        ``member`` stores it, and is to blame where it is missing; None for any that has sent no hello.
        """
        left = max(1e-3, self.deadline.left() - (1 - share) * self.deadline.seconds)
        self.store.set_timeout(datetime.timedelta(seconds=left))
        start = time.monotonic()
        try:
            return self.store.get(key).decode(errors="replace")
        except RuntimeError as error:
            if time.monotonic() - start >= left:
                member = member or self._missing()
                raise TransportFault(f"{member} did not come within {self.deadline.seconds:g} s (timeout)") from None
            raise TransportFault(f"the store at {self.config.master_address} is gone: {first_line(error)}") from None

    def _missing(self) -> Member:
        """The first rank that has sent no hello; the baseline's rank 0 if all have, or if the store does not answer."""
        with contextlib.suppress(RuntimeError):
            return next((member for member in self.members if not self._has_hello(member)), self.members[0])
        return self.members[0]

    def _has_hello(self, member: Member) -> bool:
        """Whether a rank has sent its hello."""
        return bool(self.store.check([f"hello/{member.index}"]))

    def _wait_for_byes(self) -> None:
        """Waits until every rank that sent a hello has the verdict: the store ends with rank 0's process."""
        self.store.set_timeout(datetime.timedelta(seconds=min(_BYE_TIMEOUT_S, self.deadline.left())))
        try:
            self.store.wait([f"bye/{member.index}" for member in self.members if self._has_hello(member)])
        except RuntimeError:
            logger.debug("sgl_comm: grafter: not every rank has read the verdict")
