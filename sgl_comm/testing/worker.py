"""The inside of one rank: what a worker process of a :class:`~sgl_comm.testing.RankPool` does.

A worker joins the group, then runs one case after another. A thread of its own reads the parent's pipe, so that the
parent's death is seen even while a case is blocked.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import faulthandler
import io
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import sgl_comm

STACK_SIGNAL = signal.SIGUSR1
"""On this signal a worker writes the Python stacks of its threads into its stack pipe."""

CLOSE = b""
"""The message that asks a worker to leave the group and exit."""

_PR_SET_PDEATHSIG = 1
_GROUP_TIMEOUT = datetime.timedelta(seconds=300)


@dataclasses.dataclass(frozen=True)
class RankContext:
    """What a case gets as its first argument.

    ``comm`` is None in a pool made with ``make_comm=False``. ``group`` is the worker's default group (gloo).
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup
    comm: sgl_comm.Communicator | None


@dataclasses.dataclass(frozen=True)
class RankSetup:
    """Everything a worker needs to join its group."""

    rank: int
    world: int
    device: str
    store_path: str
    environ: dict[str, str]
    make_comm: bool
    die_with_parent: bool


class _Pickler(pickle.Pickler):
    """Sends tensors as bytes: a descriptor or a name in shared memory would outlive a killed rank."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        buffer = io.BytesIO()
        torch.save(obj.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
        return _load_tensor, (buffer.getvalue(),)


def _load_tensor(data: bytes) -> torch.Tensor:
    return torch.load(io.BytesIO(data), weights_only=True)


def dumps(value: Any) -> bytes:
    """Pickles ``value``; tensors inside it arrive as row-major CPU tensors of the same dtype, shape and bits."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The inverse of :func:`dumps`."""
    return pickle.loads(data)


def serve(setup: RankSetup, conn: Connection, stacks: Connection) -> None:
    """The main function of a worker: joins, reports, runs cases until it gets ``CLOSE``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if setup.die_with_parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.set_blocking(stacks.fileno(), False)
    faulthandler.register(STACK_SIGNAL, file=stacks.fileno(), all_threads=True)
    cases: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_cases, args=(conn, cases), name="sgl_comm-cases", daemon=True).start()

    try:
        ctx = _join(setup)
    except BaseException:
        conn.send_bytes(dumps((False, traceback.format_exc())))
        return
    conn.send_bytes(dumps((True, None)))

    while (case := cases.get()) != CLOSE:
        conn.send_bytes(_run_case(ctx, case))
    if ctx.comm is not None:
        ctx.comm.close()
    dist.destroy_process_group()


def _read_cases(conn: Connection, cases: queue.SimpleQueue[bytes]) -> None:
    message = None
    while message != CLOSE:
        try:
            message = conn.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone: nobody is left to report to
        cases.put(message)


def _join(setup: RankSetup) -> RankContext:
    os.environ.clear()
    os.environ.update(setup.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device(setup.device)
    if device.type == "cuda":
        if torch.cuda.device_count() == 0:
            raise RuntimeError('device "cuda": torch sees no GPU')
        device = torch.device("cuda", setup.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.FileStore(setup.store_path)
    dist.init_process_group("gloo", store=store, rank=setup.rank, world_size=setup.world, timeout=_GROUP_TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    comm = sgl_comm.init(group, device=device) if setup.make_comm else None
    return RankContext(setup.rank, setup.world, device, group, comm)


def _run_case(ctx: RankContext, case: bytes) -> bytes:
    try:
        search_path, call = loads(case)
        sys.path[:] = search_path
        fn, args, kw = loads(call)
        return dumps((True, fn(ctx, *args, **kw)))
    except BaseException:
        return dumps((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
