"""init, close, the registry of groups, and what every error says."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sgl_comm
from helpers.calls import AllGather, AllReduce, ReduceScatter, interleaved, sum_of_ones
from helpers.errors import error_text, error_with_type
from helpers.values import EVERY_DTYPE
from sgl_comm import SglCommError
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.testing import RankContext, RankPool, run_ranks


def error_as_sent(call: Callable[[], object]) -> str:
    """The error of an op called through torch.ops, without torch's own C++ stack, which may follow its text."""
    return error_with_type(call).partition("\nException raised from")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank of a default group."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- one process is enough


@pytest.mark.usefixtures("alone")
def test_a_communicator_serves_its_group_until_it_is_closed() -> None:
    with sgl_comm.init() as comm:
        assert (comm.rank, comm.world_size, comm.group_name) == (0, 1, dist.group.WORLD.group_name)
        assert comm.device == torch.device("cpu")
        assert (comm.backend, comm.reason) == ("shm", "")
        assert "group '0', rank 0 of 1, cpu: served by shm" in str(comm)
        assert comm.all_reduce(torch.ones(3)).tolist() == [1, 1, 1]
        assert comm.all_reduce_(torch.ones(3)) is None
        comm.check()
    closed = re.escape("all_reduce: the communicator of group '0' is closed; init() it again")
    with pytest.raises(SglCommError, match="^sgl_comm::" + closed):
        comm.all_reduce(torch.ones(3))
    with pytest.raises(SglCommError, match=re.escape("check: the communicator of group '0' is closed")):
        comm.check()
    comm.close()
    with sgl_comm.init(dist.group.WORLD, "cpu") as again:
        comm.close()  # the old one must not close the new one
        assert sum_of_ones(again.group_name) == [1]


@pytest.mark.usefixtures("alone")
def test_the_context_manager_closes_after_an_error_too() -> None:
    with pytest.raises(KeyError), sgl_comm.init() as comm:
        raise KeyError
    assert "is closed" in error_with_type(lambda: comm.all_reduce(torch.ones(3)))


@pytest.mark.usefixtures("alone")
def test_an_unknown_group_is_named_with_the_known_ones() -> None:
    expected = "sgl_comm::{op}: unknown group 'nowhere'; call sgl_comm.init(group) first (known: {known})"
    ops = {"all_reduce": sgl_comm.ops.all_reduce, "all_reduce_": sgl_comm.ops.all_reduce_}
    for op, wrapper in ops.items():
        with pytest.raises(SglCommError) as caught:
            wrapper(torch.ones(3), "nowhere")
        assert str(caught.value).startswith(expected.format(op=op, known="none"))
    with sgl_comm.init(), pytest.raises(SglCommError) as caught:
        sgl_comm.ops.all_reduce(torch.ones(3), "nowhere")
    assert str(caught.value).startswith(expected.format(op="all_reduce", known="'0'"))


@pytest.mark.usefixtures("alone")
def test_init_on_a_live_name_is_refused_and_does_no_harm() -> None:
    with sgl_comm.init() as comm:
        with pytest.raises(SglCommError, match=r"init: group '0' already has a communicator; close\(\) it first"):
            sgl_comm.init()
        assert sum_of_ones(comm.group_name) == [1]
        comm.check()


@pytest.mark.usefixtures("alone")
def test_init_refuses_devices_that_it_cannot_serve() -> None:
    for device in ("meta", torch.device("meta")):
        with pytest.raises(SglCommError, match=r"init: got device .*meta.*; expected the CPU or a CUDA device"):
            sgl_comm.init(device=device)
    with sgl_comm.init() as comm:
        assert sum_of_ones(comm.group_name) == [1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_init_does_not_claim_to_serve_a_gpu_that_is_not_there(device: str | int) -> None:
    group = dist.new_group([0])
    try:
        with sgl_comm.init(group, device) as comm:
            assert comm.backend != "v2"
            assert comm.reason != ""
    except SglCommError as error:
        assert str(error).startswith(f"init: got device {device!r}; expected")  # noqa: PT017


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e30"])
def test_an_invalid_timeout_is_an_error_of_init(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = dist.new_group([0])
    monkeypatch.setenv("SGLCOMM_TIMEOUT", text)
    with pytest.raises(SglCommError, match=f"init: got SGLCOMM_TIMEOUT='{text}'; expected a number of seconds above"):
        sgl_comm.init(group)
    monkeypatch.delenv("SGLCOMM_TIMEOUT")
    with sgl_comm.init(group) as comm:
        assert sum_of_ones(comm.group_name) == [1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["-1", "soon", "1e3", "1.5", str(2**62 + 1)])
def test_an_invalid_first_epoch_is_an_error_of_init(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_FIRST_EPOCH", text)
    with pytest.raises(SglCommError) as caught:
        sgl_comm.init()
    assert str(caught.value) == f"init: got SGLCOMM_FIRST_EPOCH='{text}'; expected a whole number from 0 to 2**62"


def test_init_without_any_group_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SglCommError, match=r"init: got no group and there is no default one; expected"):
        sgl_comm.init()


def test_init_with_a_group_of_others_is_an_error() -> None:
    with pytest.raises(SglCommError, match="init: got a group that this process is not in"):
        sgl_comm.init(dist.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.usefixtures("alone")
def test_messages_name_dtypes_as_pytorch_does() -> None:
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    named = set()
    with sgl_comm.init() as comm:
        for dtype in dtypes:
            text = error_text(lambda dtype=dtype: comm.all_gather(torch.empty((), dtype=dtype)))
            if "Not yet supported ScalarType" not in text:  # said by the stable ABI, of bits and the like
                name = str(dtype).removeprefix("torch.")
                assert text == f"sgl_comm::all_gather: got {name}[] on cpu; expected at least one dimension"
                named.add(dtype)
    assert named >= set(EVERY_DTYPE)


@pytest.mark.usefixtures("alone")
def test_an_input_that_requires_grad_is_refused_unless_grad_mode_is_off() -> None:
    x = torch.ones(4, requires_grad=True)
    with sgl_comm.init() as comm:
        name = comm.group_name
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: sgl_comm.ops.all_reduce(x, name),
            "all_reduce_": lambda: sgl_comm.ops.all_reduce_(x, name),
        }
        through_ops: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: torch.ops.sgl_comm.all_reduce(x, name),
            "all_reduce_": lambda: torch.ops.sgl_comm.all_reduce_(x, name),
        }
        for op in calls:
            text = f"sgl_comm::{op}: got float32[4] on cpu that requires grad; expected one that does not"
            assert error_with_type(calls[op]).startswith(f"SglCommError: {text}")
            assert error_with_type(through_ops[op]).startswith(f"RuntimeError: {text}")
            for off in (torch.no_grad, torch.inference_mode):
                with off():
                    assert error_with_type(calls[op]) == "no error"
                    assert error_with_type(through_ops[op]) == "no error"
        derived = x * 2
        assert "requires grad" in error_with_type(lambda: sgl_comm.ops.all_reduce(derived, name))
        assert comm.all_reduce(x.detach()).requires_grad is False
        with torch.no_grad():
            assert comm.all_reduce(x).requires_grad is False


@pytest.mark.usefixtures("alone")
def test_errors_have_one_text_through_both_doors() -> None:
    x = torch.ones(4)
    overlapping = torch.ones(1, 4).expand(3, 4)
    with sgl_comm.init() as comm:
        name = comm.group_name
        for wrapper, op, expected in (
            (
                lambda: sgl_comm.ops.all_reduce(x, name, "mean"),
                lambda: torch.ops.sgl_comm.all_reduce(x, name, "mean"),
                "sgl_comm::all_reduce: got reduce_op 'mean'; expected one of sum, avg, product, min, max, band, bor,",
            ),
            (
                lambda: sgl_comm.ops.all_reduce_(x, name, ""),
                lambda: torch.ops.sgl_comm.all_reduce_(x, name, ""),
                "sgl_comm::all_reduce_: got reduce_op ''; expected one of sum,",
            ),
            (
                lambda: sgl_comm.ops.all_reduce(x, "nowhere"),
                lambda: torch.ops.sgl_comm.all_reduce(x, "nowhere"),
                "sgl_comm::all_reduce: unknown group 'nowhere'; call sgl_comm.init(group) first",
            ),
            (
                lambda: sgl_comm.ops.all_reduce_(overlapping, name),
                lambda: torch.ops.sgl_comm.all_reduce_(overlapping, name),
                "sgl_comm::all_reduce_: got float32[3, 4] on cpu in which several elements share memory (expand);",
            ),
        ):
            assert error_as_sent(wrapper).startswith(f"SglCommError: {expected}")
            assert error_as_sent(op) == error_as_sent(wrapper).replace("SglCommError", "RuntimeError", 1)


# --- between ranks


def two_communicators(ctx: RankContext) -> list[str]:
    """Two groups of the same ranks: closing one leaves the other alone."""
    assert ctx.comm is not None
    group = dist.new_group(list(range(ctx.world)))
    second = sgl_comm.init(group)
    seen = [second.group_name != ctx.comm.group_name]
    for count in (5, 5000, 100_000):
        seen += [sum_of_ones(ctx.comm.group_name, count) == [ctx.world]]
        seen += [sum_of_ones(second.group_name, count) == [ctx.world]]
    second.close()
    second.close()
    seen.append("is closed" in error_with_type(lambda: sum_of_ones(second.group_name)))
    seen.append(sum_of_ones(ctx.comm.group_name) == [ctx.world])
    with sgl_comm.init(group) as third:
        seen.append(third.all_reduce(torch.ones(2)).tolist() == [ctx.world] * 2)
    dist.destroy_process_group(group)
    return [f"{number}" for number, right in enumerate(seen) if not right]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_two_communicators_live_side_by_side(world: int) -> None:
    assert run_ranks(two_communicators, world) == [[]] * world


def sub_group(ctx: RankContext) -> str:
    """A group of ranks 1 and 2 of 3; rank 0 is not in it."""
    group = dist.new_group([1, 2])
    if ctx.rank == 0:
        return error_with_type(lambda: sgl_comm.init(group))
    with sgl_comm.init(group) as comm:
        total = comm.all_reduce(torch.tensor([float(ctx.rank)])).item()
        text = f"rank {comm.rank} of {comm.world_size}: {total}"
    dist.destroy_process_group(group)
    return text


def test_a_rank_outside_a_group_cannot_init_it_and_the_others_can() -> None:
    outside, *inside = run_ranks(sub_group, 3)
    assert outside.startswith("SglCommError: init: got a group that this process is not in; expected")
    assert inside == ["rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]


def start_over(ctx: RankContext, folder: str, old: str) -> list[list[float]]:
    """Three default groups one after the other, all named "0"; what becomes of the old one's communicator differs."""
    sums, held = [], []
    for number in range(3):
        dist.destroy_process_group()
        store = dist.FileStore(f"{folder}/{number}", ctx.world)
        dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world)
        comm = sgl_comm.init()
        sums.append(sum_of_ones(comm.group_name))
        if old == "closed":
            comm.close()
        if old == "held":
            held.append(dist.group.WORLD)
    comm.close()
    return sums


@pytest.mark.parametrize("old", ["closed", "forgotten", "held"])
def test_a_new_default_group_of_the_same_name_gets_a_communicator(old: str, tmp_path: Path) -> None:
    """Though the old communicator was not closed, and though somebody still holds the destroyed group."""
    with RankPool(2, make_comm=False) as pool:
        assert pool.run(start_over, str(tmp_path), old) == [[[2.0]] * 3] * 2


def init_with_a_bad_timeout_on_rank_1(ctx: RankContext) -> tuple[str, list[float]]:
    group = dist.new_group(list(range(ctx.world)))
    if ctx.rank == 1:
        os.environ["SGLCOMM_TIMEOUT"] = "soon"
    text = error_with_type(lambda: sgl_comm.init(group))
    os.environ.pop("SGLCOMM_TIMEOUT", None)
    with sgl_comm.init(group) as comm:
        return text, sum_of_ones(comm.group_name)


def test_a_setting_that_is_bad_on_one_rank_is_an_error_on_all() -> None:
    for text, after in run_ranks(init_with_a_bad_timeout_on_rank_1, 2, deadline=10):
        assert text.startswith("SglCommError: ")
        assert "SGLCOMM_TIMEOUT='soon'" in text
        assert after == [2.0]


@pytest.mark.parametrize("first_epoch", [2**31 - 5, 2**32 - 5, 2**32, 2**62])
@pytest.mark.parametrize("world", [2, 3])
def test_counters_wrap_without_harm(world: int, first_epoch: int) -> None:
    """The futex word is the low half of a step's number; the late ranks make the others sleep on it."""
    kinds = [AllReduce, ReduceScatter, AllGather]
    with RankPool(world, env={"SGLCOMM_FIRST_EPOCH": str(first_epoch), "SGLCOMM_TIMEOUT": "20"}) as pool:
        assert pool.run(interleaved, kinds, 30, pause=0.005, deadline=60) == [[]] * world


def count_from_different_numbers(ctx: RankContext) -> tuple[str, str, list[float]]:
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLCOMM_FIRST_EPOCH", str(7 + ctx.rank))
        comm = sgl_comm.init(group)
    with comm:
        return comm.backend, comm.reason, sum_of_ones(comm.group_name)


def test_ranks_that_count_from_different_numbers_get_no_shared_memory() -> None:
    reason = "rank 0: the ranks have different values of SGLCOMM_FIRST_EPOCH"
    assert run_ranks(count_from_different_numbers, 2) == [("gloo", reason, [2.0])] * 2


def refused_in_place(ctx: RankContext) -> list[str]:
    """One rank passes a tensor that overlaps itself; it alone must see an error, and the next call must work."""
    assert ctx.comm is not None
    comm, wrong = ctx.comm, []
    shapes = {
        "expand": torch.ones(1, 4).expand(3, 4),
        "expand of a column": torch.ones(4, 1).expand(4, 3),
        "windows": torch.ones(10).as_strided((4, 4), (2, 1)),
        "interleaved": torch.ones(16).as_strided((3, 3), (2, 4)),
    }
    for name, x in shapes.items():
        for rank in range(ctx.world):
            if ctx.rank == rank:
                text = error_with_type(lambda x=x: comm.all_reduce_(x))
                if "several elements share memory" not in text or not bool((x == 1).all()):
                    wrong.append(f"{name}: {text}")
            if sum_of_ones(comm.group_name) != [ctx.world]:
                wrong.append(f"{name}: the next call")
    disjoint = torch.ones(12).as_strided((3, 2), (2, 7))  # interleaved, but no two elements meet
    comm.all_reduce_(disjoint)
    if disjoint.unique().tolist() != [ctx.world]:
        wrong.append("interleaved without overlap")
    return wrong


def test_a_tensor_that_overlaps_itself_is_refused_before_anything_is_sent() -> None:
    assert run_ranks(refused_in_place, 2) == [[], []]


def refused_arguments(ctx: RankContext) -> list[str]:
    """Bad arguments on one rank alone do not put the ranks out of step."""
    assert ctx.comm is not None
    comm, wrong = ctx.comm, []
    bad = {
        "mean": lambda: comm.all_reduce(torch.ones(3), "mean"),
        "requires grad": lambda: comm.all_reduce(torch.ones(3, requires_grad=True)),
    }
    for words, call in bad.items():
        if ctx.rank == 0 and words not in error_with_type(call):
            wrong.append(words)
        if sum_of_ones(comm.group_name) != [ctx.world]:
            wrong.append(f"the call after {words}")
    return wrong


def test_bad_arguments_on_one_rank_leave_the_others_in_step() -> None:
    assert run_ranks(refused_arguments, 3) == [[], [], []]


def mismatched(ctx: RankContext, count_of_rank_1: int, dtype_of_rank_1: torch.dtype) -> tuple[str, str, float]:
    x = torch.ones(count_of_rank_1, dtype=dtype_of_rank_1) if ctx.rank == 1 else torch.ones(1000)
    group = dist.new_group(list(range(ctx.world)))
    with sgl_comm.init(group) as comm:
        start = time.monotonic()
        first = error_with_type(lambda: comm.all_reduce(x))
        took = time.monotonic() - start
        checked = error_with_type(comm.check)
        dist.barrier(ctx.group)
    with sgl_comm.init(group) as comm:
        assert sum_of_ones(comm.group_name) == [ctx.world]
    return first, checked, took


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("count", "dtype", "words"),
    [
        (1001, torch.float32, "1001 float32"),
        (0, torch.float32, "0 float32"),
        (500_000, torch.float32, "500000 float32"),
        (1000, torch.bfloat16, "1000 bfloat16"),
        (2000, torch.float16, "2000 float16"),
    ],
    ids=str,
)
def test_different_sizes_or_dtypes_are_an_error_on_every_rank(
    world: int, count: int, dtype: torch.dtype, words: str
) -> None:
    for first, checked, took in run_ranks(mismatched, world, count, dtype):
        for text in (first, checked):
            assert "called all_reduce of 1000 float32" in text
            assert f"called all_reduce of {words}" in text
            assert "rank 1" in text
            assert text.startswith("SglCommError")
        assert took < 1


def init_on_different_devices(ctx: RankContext) -> str:
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == 0:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
        return error_with_type(lambda: sgl_comm.init(group, "cuda:0" if ctx.rank == 0 else "cpu"))


def test_ranks_with_different_kinds_of_device_are_refused_together() -> None:
    for text in run_ranks(init_on_different_devices, 2, deadline=20):
        assert text == "SglCommError: init: got devices cuda, cpu on ranks 0 to 1; expected one"


def test_a_group_that_is_still_being_initialised_serves_no_call() -> None:
    torch.ops.sgl_comm._shm_open("half made", 0, 1)
    try:
        with pytest.raises(RuntimeError, match="all_reduce: group 'half made' is still being initialised"):
            torch.ops.sgl_comm.all_reduce(torch.ones(1), "half made")
    finally:
        torch.ops.sgl_comm._shm_close("half made")


def test_a_tensor_without_strides_is_refused(alone: None) -> None:
    with sgl_comm.init() as comm, pytest.raises(SglCommError, match="all_reduce: got a tensor without strides"):
        comm.all_reduce(torch.eye(3).to_sparse())


def backends_of_groups(ctx: RankContext, folder: str) -> list[str]:
    """What the fallback uses: of a gloo group, and of a default group made without a word on backends."""
    backends = [Rendezvous.of(ctx.group).backend_for(device) for device in ("cpu", "cuda")]
    dist.destroy_process_group()
    dist.init_process_group(store=dist.FileStore(f"{folder}/store", ctx.world), rank=ctx.rank, world_size=ctx.world)
    return backends + [Rendezvous.of(None).backend_for(device) for device in ("cpu", "cuda")]


def test_a_group_of_several_backends_has_one_for_each_device(tmp_path: Path) -> None:
    with RankPool(1, make_comm=False) as pool:
        ((*gloo, of_cpu, of_gpu),) = pool.run(backends_of_groups, str(tmp_path))
    assert gloo == ["gloo", "gloo"]
    assert (of_cpu, of_gpu) == ("gloo", "nccl" if torch.cuda.is_available() else "none")


def a_group_that_is_gone(ctx: RankContext) -> str:
    group = dist.new_group(list(range(ctx.world)))
    comm = sgl_comm.init(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()

    def capture() -> None:
        with comm.capture():
            pass

    text = error_with_type(capture)
    comm.close()
    return text


def test_capture_on_a_group_that_is_gone_says_so() -> None:
    for text in run_ranks(a_group_that_is_gone, 2, deadline=20):
        assert text.startswith("SglCommError: capture: the group is gone")
