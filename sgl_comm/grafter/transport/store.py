"""The store over which the ranks of both sides exchange keys: torch's ``TCPStore`` on a socket of our own.

Rank 0 of the baseline listens at the given address alone, since a ``TCPStore`` by itself listens on every interface.
"""

from __future__ import annotations

import errno
import socket
import time

from torch.distributed import Store, TCPStore

from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import TransportFault, first_line
from sgl_comm.grafter.transport.deadline import Deadline

_RETRY_S = 0.05


def open_store(config: GrafterConfig, is_master: bool, deadline: Deadline) -> tuple[Store, str]:
    """The store of both sides, and this host's address on the way to it; its master is the baseline's rank 0.

    Raises:
        TransportFault: there is none at that address, or none can be opened.
    """
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
            timeout=deadline.left_as_timedelta(),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
    except (RuntimeError, ValueError) as error:
        raise TransportFault(f"no store at {where} (master_address, master_port): {first_line(error)}") from None
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
