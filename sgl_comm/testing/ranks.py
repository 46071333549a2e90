"""Real processes as ranks, kept alive between cases.

``run_ranks`` runs a function on every rank and returns the results in rank order. Nothing here waits for ever: a case
has a deadline, a rank that dies is noticed at once, and workers die with their parent.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from sgl_comm.testing import worker

START_DEADLINE_S = 120.0
"""How long a new pool may take until every rank has joined."""

GRACE_S = 5.0
"""How long, after a rank failed, the others may go on before they are counted as stuck."""

EXIT_DEADLINE_S = 10.0
"""How long to wait for the exit code of a rank that has hung up: a GPU's driver takes seconds to let a process go."""

CLOSE_DEADLINE_S = 2.0
"""How long workers may take to leave before they are killed."""

MAX_POOLS = 8
"""How many pools ``run_ranks`` keeps; the one unused for longest is closed first."""

_QUIET_S = 0.2


@dataclasses.dataclass(frozen=True)
class Dead:
    """Stands for the result of a rank whose process ended. ``exitcode`` is minus the signal number if it was killed."""

    rank: int
    exitcode: int | None

    def __str__(self) -> str:
        if self.exitcode is not None and self.exitcode < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.exitcode).name}"
        return f"rank {self.rank} ended with exit code {self.exitcode}"


class RankError(RuntimeError):
    """Some ranks failed. ``failures``: rank -> traceback or how it died; ``stuck``: rank -> Python stack."""

    def __init__(self, failures: Mapping[int, str], stuck: Mapping[int, str]) -> None:
        self.failures, self.stuck = dict(failures), dict(stuck)
        parts = [f"failed on {_names(failures)}"]
        parts += [f"--- rank {rank}:\n{text.rstrip()}" for rank, text in sorted(failures.items())]
        parts += [f"--- rank {rank} was still running:\n{text.rstrip()}" for rank, text in sorted(stuck.items())]
        super().__init__("\n".join(parts))


class RankTimeout(TimeoutError):
    """The deadline passed. ``stuck``: rank -> Python stack of each rank that had not answered."""

    def __init__(self, deadline: float, stuck: Mapping[int, str]) -> None:
        self.stuck = dict(stuck)
        parts = [f"{_names(stuck)} still running after {deadline:g} s"]
        parts += [f"--- rank {rank}:\n{text.rstrip()}" for rank, text in sorted(stuck.items())]
        super().__init__("\n".join(parts))


@dataclasses.dataclass
class _Rank:
    process: multiprocessing.process.BaseProcess
    conn: Connection
    stacks: Connection
    dead: Dead | None = None


class RankPool:
    """``world`` worker processes that form one group; a context manager.

    Args:
        world: number of ranks, from 1.
        device: "cpu", or "cuda" for GPU ``rank % device_count()`` in each rank (ranks may share a GPU).
        env: environment variables of the workers, on top of this process's; None as a value removes one. They are
            set before the group and CUDA are, but what torch reads while it is imported was read earlier.
        make_comm: whether each rank gets a communicator (``RankContext.comm``).

    Raises:
        RankError: a rank could not join.
        RankTimeout: not every rank joined within ``START_DEADLINE_S``.

    A script that makes a pool needs the usual ``if __name__ == "__main__"`` guard.
    """

    def __init__(
        self, world: int, device: str = "cpu", env: Mapping[str, str | None] | None = None, make_comm: bool = True
    ) -> None:
        if world < 1:
            raise ValueError(f"RankPool: world must be at least 1, got {world}")
        self.world, self.device = world, device
        self._owner, self._closed = os.getpid(), False
        self._ranks: list[_Rank] = []
        changed = {**os.environ, **(env or {})}
        environ = {name: value for name, value in changed.items() if value is not None}
        # A file without a name: a TCPStore asks the DNS for its peers' names, which can take seconds.
        self._store = os.memfd_create("sgl_comm-store", os.MFD_CLOEXEC)
        store_path = f"/proc/{self._owner}/fd/{self._store}"
        context = _context()
        dies = context.get_start_method() == "forkserver"
        _open_pools.add(self)
        try:
            for rank in range(world):
                setup = worker.RankSetup(rank, world, device, store_path, environ, make_comm, die_with_parent=dies)
                self._ranks.append(_start(context, setup))
            self._collect(START_DEADLINE_S, allow_dead=False)
        except BaseException:
            self.kill()
            raise

    @property
    def processes(self) -> list[int]:
        """Process ids in rank order; a test may send them signals."""
        return [rank.process.pid or 0 for rank in self._ranks]

    @property
    def usable(self) -> bool:
        """Whether the pool is open and every rank lives."""
        return not self._closed and all(rank.dead is None and rank.process.is_alive() for rank in self._ranks)

    def run(
        self, fn: Callable[..., Any], *args: Any, deadline: float = 60.0, allow_dead: bool = False, **kw: Any
    ) -> list[Any]:
        """Calls ``fn(ctx, *args, **kw)`` on every rank and returns the results in rank order.

        Args:
            fn: a function of a module's top level; its first argument is a :class:`RankContext`.
            deadline: seconds until the ranks that have not answered are killed.
            allow_dead: a rank whose process ends (or had ended) gives a :class:`Dead` as its result; else that is a
                RankError.

        Tensors travel both ways as row-major CPU tensors. After any exception from here the pool is dead.

        Raises:
            RankError: a rank raised or died.
            RankTimeout: the deadline passed.
        """
        if self._closed:
            raise RuntimeError("RankPool.run: the pool is closed")
        case = worker.dumps((list(sys.path), worker.dumps((fn, args, kw))))
        try:
            for rank in self._ranks:
                if rank.dead is None:
                    with contextlib.suppress(OSError):  # one that died is found below
                        rank.conn.send_bytes(case)
            return self._collect(deadline, allow_dead)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Asks the workers to leave and kills them after ``CLOSE_DEADLINE_S``. Safe to call twice, or in a fork."""
        self._ask_to_close()
        self._finish(time.monotonic() + CLOSE_DEADLINE_S)

    def kill(self) -> None:
        """Kills every worker (SIGKILL) and closes the pool."""
        self._finish(time.monotonic())

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, deadline: float, allow_dead: bool) -> list[Any]:
        ends_at = time.monotonic() + deadline
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}

        def take(number: int, ok: bool, answer: Any) -> None:
            nonlocal ends_at
            waiting.discard(number)
            if ok:
                answers[number] = answer
            else:
                failures[number] = str(answer)
                ends_at = min(ends_at, time.monotonic() + GRACE_S)

        waiting = set(range(self.world))
        for number, rank in enumerate(self._ranks):
            if rank.dead is not None:
                take(number, allow_dead, rank.dead)
        while waiting:
            living = [self._ranks[number] for number in waiting]
            sources = [source for rank in living for source in (rank.conn, rank.process.sentinel)]
            ready = wait(sources, max(0.0, ends_at - time.monotonic()))
            for number in sorted(waiting):
                rank = self._ranks[number]
                if rank.conn in ready or rank.process.sentinel in ready:
                    take(number, *self._answer(number, allow_dead))
            if not ready and time.monotonic() >= ends_at:
                break
        stuck = self._stacks(waiting)
        if failures:
            raise RankError(failures, stuck)
        if stuck:
            raise RankTimeout(deadline, stuck)
        return [answers[number] for number in range(self.world)]

    def _answer(self, number: int, allow_dead: bool) -> tuple[bool, Any]:
        rank = self._ranks[number]
        try:
            if rank.conn.poll(0):
                return worker.loads(rank.conn.recv_bytes())
        except (EOFError, OSError):
            pass
        rank.process.join(EXIT_DEADLINE_S)
        rank.dead = Dead(number, rank.process.exitcode)
        return allow_dead, rank.dead

    def _stacks(self, numbers: Iterable[int]) -> dict[int, str]:
        numbers = sorted(numbers)
        for number in numbers:
            if self._ranks[number].process.is_alive():
                os.kill(self.processes[number], worker.STACK_SIGNAL)
        return {number: _drain(self._ranks[number].stacks) or "(no stack)" for number in numbers}

    def _ask_to_close(self) -> None:
        if self._closed or os.getpid() != self._owner:
            return
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.conn.send_bytes(worker.CLOSE)

    def _finish(self, kill_at: float) -> None:
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for rank in self._ranks:
            rank.process.join(max(0.0, kill_at - time.monotonic()))
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(CLOSE_DEADLINE_S)
            rank.conn.close()
            rank.stacks.close()
        os.close(self._store)
        _open_pools.discard(self)


_open_pools: weakref.WeakSet[RankPool] = weakref.WeakSet()
_kept_pools: dict[tuple[int, str], RankPool] = {}


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, device: str = "cpu", deadline: float = 60.0, **kw: Any
) -> list[Any]:
    """``RankPool.run`` on a pool kept for ``(world, device)``: made when first asked for, replaced after a failure.

    The workers see the environment of the moment their pool was made; use a private RankPool for other variables.
    """
    key = (world, device)
    pool = _kept_pools.pop(key, None)
    if pool is not None and not pool.usable:
        pool.kill()
        pool = None
    while pool is None and len(_kept_pools) >= MAX_POOLS:
        _kept_pools.pop(next(iter(_kept_pools))).close()
    _kept_pools[key] = pool = pool or RankPool(world, device)
    return pool.run(fn, *args, deadline=deadline, **kw)


def close_pools() -> None:
    """Closes every open pool of this process; runs at exit."""
    pools = list(_open_pools)
    for pool in pools:
        pool._ask_to_close()
    kill_at = time.monotonic() + CLOSE_DEADLINE_S
    for pool in pools:
        pool._finish(kill_at)
    _kept_pools.clear()


atexit.register(close_pools)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What takes long to import and this process has imported (the test runner, where it is the main module, or the
    # compiler) would otherwise be imported again by every worker.
    slow = [name for name in ("pytest", "torch._dynamo") if name in sys.modules]
    context.set_forkserver_preload(["torch", "torch.distributed", "sgl_comm", "sgl_comm.testing", *slow])
    return context


def _start(context: Any, setup: worker.RankSetup) -> _Rank:
    conn, worker_conn = context.Pipe()
    stacks, worker_stacks = context.Pipe(duplex=False)
    process = context.Process(
        target=worker.serve, args=(setup, worker_conn, worker_stacks), name=f"rank{setup.rank}", daemon=True
    )
    process.start()
    worker_conn.close()
    worker_stacks.close()
    return _Rank(process, conn, stacks)


def _drain(stacks: Connection) -> str:
    text = b""
    while wait([stacks], _QUIET_S):
        chunk = os.read(stacks.fileno(), 1 << 16)
        if not chunk:
            break
        text += chunk
    return text.decode(errors="replace")


def _names(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
