"""Who may take part: what a client of the store can and cannot do without the token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from helpers.grafting import config_of, free_port
from sgl_comm.grafter import GrafterConfig
from sgl_comm.grafter.faults import TransportFault
from sgl_comm.grafter.transport.deadline import Deadline
from sgl_comm.grafter.transport.handshake import Session, handshake

SECONDS = 2.0


def config(role: str, port: int, **fields: Any) -> GrafterConfig:
    values = config_of(role, (1, 2), port, b2t_filter="True", layout="Replicate", token="secret", timeout=SECONDS)
    return GrafterConfig(**{**values, **fields})


def come(role: str, rank: int, port: int, **fields: Any) -> Session | str:
    """The session, or why there is none."""
    try:
        return handshake(config(role, port, **fields), rank, Deadline(SECONDS))
    except TransportFault as error:
        return str(error)


def stranger(port: int, is_master: bool = False) -> tuple[TCPStore, PrefixStore]:
    """A client, or the server, who knows the names of keys and no token."""
    store = TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False)
    return store, PrefixStore("sgl_comm/grafter/sgl_comm_grafter", store)


def test_a_verdict_of_another_handshake_lets_nobody_in() -> None:
    """One who has read it, and now listens where the baseline should, has no use for it."""
    port = free_port()
    with ThreadPoolExecutor(3) as everyone:
        ranks = [("baseline", 0), ("target", 0), ("target", 1)]
        sessions = list(everyone.map(lambda who: come(*who, port), ranks))
        assert all(isinstance(each, Session) for each in sessions)
        read = stranger(port)[1]
        heard = {key: read.get(key) for key in ("challenge", "verdict")}
    del sessions
    port = free_port()
    server, written = stranger(port, is_master=True)
    for key, value in heard.items():
        written.set(key, value)
    assert "gave the verdict of another handshake" in str(come("target", 0, port))
    del server


@pytest.mark.parametrize(
    "verdict", ["", "x" * 64, "\xe9" * 100, "0" * 64 + json.dumps({"reason": "", "hellos": []}), "[" * 9000]
)
def test_a_verdict_without_a_proof_is_none(verdict: str) -> None:
    port = free_port()
    server, written = stranger(port, is_master=True)
    written.set("challenge", "c")
    written.set("verdict", verdict)
    assert "baseline rank 0 has another token than target rank 0" in str(come("target", 0, port))
    del server


@pytest.mark.parametrize("hello", ["copied", "junk", "\xe9" * 200])
def test_nobody_can_come_as_another_rank(hello: str) -> None:
    """A stranger says what target rank 0 has said, or anything, as target rank 1."""
    port = free_port()
    with ThreadPoolExecutor(2) as everyone:
        ranks = [("baseline", 0), ("target", 0)]
        coming = [everyone.submit(come, *who, port) for who in ranks]
        said = None
        while said is None:
            try:
                _, store = stranger(port)
                said = store.get("hello/1")
            except RuntimeError:
                continue
        store.set("hello/2", said if hello == "copied" else hello)
        for each in coming:
            words = (
                "target rank 0 has come as target rank 1" if hello == "copied" else "target rank 1 has another token"
            )
            assert words in str(each.result())
