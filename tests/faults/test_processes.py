"""A rank as a process: forks, signals, memory."""

from __future__ import annotations

import os
import signal
import time
import traceback
from pathlib import Path

import torch

from helpers.calls import sum_of_ones
from helpers.errors import error_with_type
from sgl_comm.testing import RankContext, run_ranks


def forked(ctx: RankContext) -> list[str]:
    """A forked child must not touch the group; its parent goes on."""
    assert ctx.comm is not None
    comm = ctx.comm
    sum_of_ones(comm.group_name)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            texts = [
                error_with_type(lambda: comm.all_reduce(torch.ones(3))),
                error_with_type(lambda: comm.all_reduce_(torch.ones(3))),
                error_with_type(comm.close),
            ]
            os.write(writing, "\n".join(texts).encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        texts = pipe.read().split("\n")
    os.waitpid(child, 0)
    return [*texts, str(sum_of_ones(comm.group_name))]


def test_a_forked_child_is_refused_and_its_parent_goes_on() -> None:
    for functional, in_place, closed, after in run_ranks(forked, 2):
        for op, text in (("all_reduce", functional), ("all_reduce_", in_place)):
            assert text.startswith(f"SglCommError: sgl_comm::{op}: group '0' was made by the parent of this forked")
        assert closed == "no error"
        assert after == "[2.0]"


def reopened_in_a_child(ctx: RankContext) -> int:
    """A forked child may use a name of its parent's for a group of its own."""
    child = os.fork()
    if child == 0:
        try:
            torch.ops.sgl_comm._shm_open("0", 0, 1)
            torch.ops.sgl_comm._shm_settle("0", False)
            torch.ops.sgl_comm._shm_close("0")
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_may_open_a_name_of_its_parent() -> None:
    assert run_ranks(reopened_in_a_child, 2) == [7, 7]


def leaked_bytes_a_call(ctx: RankContext, calls: int) -> float:
    """How much the process grows a call, with grad mode on and a group name that does not fit a string's own place."""
    assert ctx.comm is not None
    x = torch.ones(4)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(calls // 2):
        torch.ops.sgl_comm.all_reduce_(x, ctx.comm.group_name)
    before = resident()
    for _ in range(calls):
        torch.ops.sgl_comm.all_reduce_(x, ctx.comm.group_name)
    return (resident() - before) / calls


def test_calls_leak_no_memory() -> None:
    assert max(run_ranks(leaked_bytes_a_call, 1, 60_000)) < 20  # a string that is not freed is 32 bytes and more


def summed_under_signals(ctx: RankContext) -> int:
    """Calls made while a signal handler runs every 100 us, rank 1 being slow so that rank 0 waits long."""
    assert ctx.comm is not None
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for _ in range(20):
            if ctx.rank == 1:
                time.sleep(0.05)
            assert sum_of_ones(ctx.comm.group_name) == [ctx.world]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 20


def test_a_signal_is_not_taken_for_a_death() -> None:
    assert run_ranks(summed_under_signals, 2) == [20, 20]
