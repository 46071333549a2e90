"""sgl_comm.testing itself: ranks that answer, fail, hang and die; values, layouts and comparisons."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from sgl_comm import testing
from sgl_comm.testing import Dead, RankContext, RankError, RankPool, RankTimeout, run_ranks


def describe(ctx: RankContext, extra: int = 0) -> tuple[int, int, str, int, int, int]:
    return ctx.rank, ctx.world, ctx.device.type, dist.get_rank(ctx.group), extra, os.getpid()


def echo(ctx: RankContext, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"sum": x + ctx.rank, "slice": x.t()[1:]}


def reduce_by_comm(ctx: RankContext, x: torch.Tensor) -> torch.Tensor:
    assert ctx.comm is not None
    return ctx.comm.all_reduce(x + ctx.rank)


def fail_on(ctx: RankContext, bad: list[int]) -> int:
    if ctx.rank in bad:
        raise ValueError(f"planted on {ctx.rank}")
    return ctx.rank


def fail_or_sleep(ctx: RankContext, bad: int) -> None:
    if ctx.rank == bad:
        raise ValueError("planted")
    time.sleep(60)


def sleep_on(ctx: RankContext, slow: int) -> int:
    if ctx.rank == slow:
        time.sleep(60)
    return ctx.rank


def die_on(ctx: RankContext, victim: int, how: str) -> int:
    if ctx.rank == victim:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.rank


def read_env(ctx: RankContext, name: str) -> str | None:
    return os.environ.get(name)


def has_comm(ctx: RankContext) -> bool:
    return ctx.comm is not None


def gone(pids: list[int]) -> bool:
    """Whether all these processes end within two seconds (a zombie has ended)."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("world", [1, 2, 3])
def test_results_come_in_rank_order(world: int) -> None:
    results = run_ranks(describe, world, extra=7, deadline=60)
    assert [result[:5] for result in results] == [(rank, world, "cpu", rank, 7) for rank in range(world)]


def test_tensors_travel_both_ways() -> None:
    x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    for rank, result in enumerate(run_ranks(echo, 2, x.t().contiguous().t())):
        testing.assert_bits_equal(result["sum"], x + rank)
        testing.assert_bits_equal(result["slice"], x.t()[1:])


def test_ranks_have_a_communicator() -> None:
    for result in run_ranks(reduce_by_comm, 2, torch.ones(5)):
        testing.assert_bits_equal(result, torch.full((5,), 3.0))


def test_a_pool_is_reused_until_a_case_fails() -> None:
    first, second = run_ranks(describe, 2), run_ranks(describe, 2)
    assert [result[-1] for result in first] == [result[-1] for result in second]
    with pytest.raises(RankError):
        run_ranks(fail_on, 2, [0])
    third = run_ranks(describe, 2)
    assert {result[-1] for result in first}.isdisjoint(result[-1] for result in third)


def test_an_exception_comes_with_every_traceback() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(fail_on, 3, [0, 2])
    assert sorted(caught.value.failures) == [0, 2]
    text = str(caught.value)
    assert "ranks 0, 2" in text
    assert "planted on 0" in text
    assert "planted on 2" in text
    assert "in fail_on" in text


def test_what_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(Exception, match=r"pickle|local object"):
        run_ranks(lambda ctx: None, 2)
    assert len(run_ranks(describe, 2)) == 2


def test_a_failed_rank_does_not_keep_the_parent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_comm.testing.ranks.GRACE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fail_or_sleep, 2, 1, deadline=50)
    assert time.monotonic() - started < 20
    assert sorted(caught.value.failures) == [1]
    assert "fail_or_sleep" in caught.value.stuck[0]


def test_a_deadline_names_the_ranks_and_shows_where_they_are() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankTimeout, match=r"rank 1 still running after 0\.5 s") as caught:
            pool.run(sleep_on, 1, deadline=0.5)
        assert list(caught.value.stuck) == [1]
        assert "in sleep_on" in caught.value.stuck[1]
        assert gone(pool.processes)
        with pytest.raises(RuntimeError, match="closed"):
            pool.run(describe)


@pytest.mark.parametrize(("how", "exitcode", "words"), [("kill", -9, "killed by SIGKILL"), ("exit", 3, "exit code 3")])
def test_a_rank_that_dies(how: str, exitcode: int, words: str) -> None:
    with RankPool(3) as pool:
        assert pool.run(die_on, 1, how, allow_dead=True) == [0, Dead(1, exitcode), 2]
        assert pool.run(fail_on, [], allow_dead=True) == [0, Dead(1, exitcode), 2]
        assert not pool.usable
        with pytest.raises(RankError, match=f"rank 1 .*{words}"):
            pool.run(fail_on, [])


def test_a_rank_killed_from_outside() -> None:
    with RankPool(2, make_comm=False) as pool:
        os.kill(pool.processes[0], signal.SIGKILL)
        assert pool.run(fail_on, [], allow_dead=True) == [Dead(0, -9), 1]


def test_a_private_pool_has_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "33")
    with RankPool(2, env={"SGLCOMM_TIMEOUT": "3"}) as pool:
        assert pool.run(read_env, "SGLCOMM_TIMEOUT") == ["3", "3"]
    with RankPool(1, env={"SGLCOMM_TIMEOUT": None}, make_comm=False) as pool:
        assert pool.run(read_env, "SGLCOMM_TIMEOUT") == [None]
        assert pool.run(has_comm) == [False]
    with RankPool(1, make_comm=False) as pool:
        assert pool.run(read_env, "SGLCOMM_TIMEOUT") == ["33"]


def test_nothing_is_left_behind() -> None:
    before = sorted(os.listdir("/dev/shm"))
    with RankPool(2) as pool:
        pool.run(reduce_by_comm, torch.ones(5))
        pids = pool.processes
    assert gone(pids)
    with RankPool(2) as pool:
        pool.run(reduce_by_comm, torch.ones(5))
        pool.run(die_on, 1, "kill", allow_dead=True)
        pids = pool.processes
    assert gone(pids)
    until = time.monotonic() + 2
    while sorted(os.listdir("/dev/shm")) != before and time.monotonic() < until:
        time.sleep(0.05)  # tests at the same time make locks there and remove them at once
    assert sorted(os.listdir("/dev/shm")) == before


PARENT = """
import time
from sgl_comm.testing import RankPool
if __name__ == "__main__":
    pool = RankPool(2)
    print(*pool.processes, flush=True)
    time.sleep(60)
"""


def test_workers_die_with_their_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    x = testing.special_values(dtype)
    info = torch.finfo(dtype)
    assert x.dtype == dtype
    assert x.numel() % 2 == 0
    assert x.signbit()[:2].tolist() == [False, True]
    assert x[:2].tolist() == [0, 0]
    assert {info.max, info.min, info.tiny, -info.tiny, float("inf"), -float("inf")} <= set(x.tolist())
    subnormals = x[(x != 0) & (x.abs() < info.tiny)]
    assert subnormals.tolist() == [info.smallest_normal * info.eps, -info.smallest_normal * info.eps]
    if dtype.itemsize <= 4:
        words = [word % (1 << 32) for word in x.view(torch.int32).tolist()]
        assert words[-2:] == [0xFFFFFFFF, 0xFFFFFFFE]


def test_bits_equal() -> None:
    x = testing.special_values(torch.bfloat16)
    assert testing.bits_equal(x, x.clone())
    assert testing.bits_equal(torch.tensor([float("nan")]), torch.tensor([-1], dtype=torch.int32).view(torch.float32))
    assert not testing.bits_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not testing.bits_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert not testing.bits_equal(torch.zeros(2), torch.zeros(2, 1))
    assert testing.bits_equal(torch.eye(3).t(), torch.eye(3))
    assert testing.bits_equal(torch.tensor([True]), torch.tensor([True]))
    assert not testing.bits_equal(torch.tensor([1 + 2j]), torch.tensor([1 - 2j]))


def test_assert_bits_equal_says_what_is_wrong() -> None:
    expected = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    actual = expected.clone()
    actual[1, 0:2] = -0.5
    with pytest.raises(AssertionError) as caught:
        testing.assert_bits_equal(actual, expected, "case")
    assert str(caught.value) == (
        "case: 2 of 6 elements differ, first at [1, 0]: got -0.5 (bits 0xb800), expected 3.0 (bits 0x4200)"
    )
    with pytest.raises(AssertionError, match=r"got torch.float16 \(2, 3\), expected torch.float16 \(6,\)"):
        testing.assert_bits_equal(actual, expected.flatten())


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 5), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_layouts_hold_the_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, shape).to(dtype)
    found = testing.layouts(shape)
    for name, layout in found.items():
        placed = layout(values)
        assert placed.tensor.shape == values.shape, name
        assert placed.tensor.dtype == dtype, name
        testing.assert_bits_equal(placed.tensor, placed.values, name)
        if layout.overlaps:
            continue
        testing.assert_bits_equal(placed.values, values, name)
        placed.tensor.fill_(1)
        placed.assert_canaries()
        assert bool((placed.tensor == 1).all())


def test_layouts_are_what_they_say() -> None:
    values = torch.rand(2, 3, 4, 5)
    placed = {name: layout(values) for name, layout in testing.layouts(values.shape).items()}
    tensors = {name: item.tensor for name, item in placed.items()}
    assert set(tensors) == {
        "row_major", "offset", "sliced", "stepped", "expanded", "transposed", "permuted", "channels_last",
    }  # fmt: skip
    assert {name for name, x in tensors.items() if x.is_contiguous()} == {"row_major", "offset"}
    assert tensors["row_major"].data_ptr() % 16 == 0
    assert tensors["offset"].data_ptr() % 16 == 4
    assert tensors["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert tensors["transposed"].transpose(2, 3).is_contiguous()
    assert tensors["permuted"].permute(1, 2, 3, 0).is_contiguous()
    assert tensors["expanded"].stride(0) == 0
    assert testing.layouts(values.shape)["expanded"].overlaps


def test_canaries_notice() -> None:
    placed = testing.layouts((3, 4))["sliced"](torch.zeros(3, 4))
    placed.assert_canaries()
    placed.buffer.view(torch.float32)[placed.tensor.storage_offset() + 4] = 1.0
    with pytest.raises(AssertionError, match="16, 17, 18, 19"):
        placed.assert_canaries()
