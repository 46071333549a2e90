"""cfg_broadcast between real processes: the source's values in every rank's own layout, bit for bit."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.calls import (
    AllGather,
    AllReduce,
    CfgAllReduce,
    CfgBroadcast,
    calls_of_every_layout,
    interleaved,
    run_calls,
    run_every_layout,
    run_signal_like_values,
)
from helpers.compare import difference
from helpers.errors import error_text
from helpers.ranks import CPU_WORLDS, SLOT_BYTES, Ranks, group_without_shared_memory, ranks_on, synchronize
from helpers.values import EVERY_DTYPE, ROW_SHAPES, name_of, random_bytes
from sgl_comm import testing
from sgl_comm.testing import RankContext

ROWS = {
    torch.uint8: (1, 511, 512, 513, 65_537, (1 << 19) + 1, (9 << 19) + 7),
    torch.bfloat16: (255, 257, (1 << 18) - 1, 5 << 18),
}
"""Numbers of elements about those at which a GPU's launch has a row, block or tile more."""

SHAPES = ((), *ROW_SHAPES, (2, 3, 2, 4, 3))

every_world = pytest.mark.parametrize("ranks", [*ranks_on("cpu", CPU_WORLDS), *ranks_on("cuda", (2, 3, 4, 8))])
some_worlds = pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3)), *ranks_on("cuda", (2, 3))])


def by_the_own_backend(ctx: RankContext) -> list[str]:
    """Where neither shared memory nor kernels serve."""
    with group_without_shared_memory(ctx) as group:
        return run_every_layout(ctx, CfgBroadcast, ((), (0,), (5,), (4, 0), (2, 3, 4, 5)), EVERY_DTYPE, group)


def in_a_group_of_some(ctx: RankContext) -> list[str]:
    """``src`` counts inside the group, of which the ranks are not 0 and up, with shared memory and without."""
    group = dist.new_group([1, 2])
    wrong: list[str] = []
    for own_backend in (False, True):
        if ctx.rank == 0:
            continue
        with pytest.MonkeyPatch.context() as patch:
            if own_backend:
                patch.setattr(
                    "sgl_comm.backends.shm_all_reduce.why_not_world_size", lambda world: "the test wants it so"
                )
            comm = sgl_comm.init(group)
        for src in (0, 1):
            got = comm.cfg_broadcast(torch.full((3,), float(ctx.rank)), src)
            wrong += [] if got.tolist() == [src + 1.0] * 3 else [f"from {src}: got {got.tolist()}"]
        comm.close()
    dist.barrier(ctx.group)
    dist.destroy_process_group(group)
    return wrong


def around_the_chunk(ctx: RankContext) -> list[str]:
    """Sizes at which the number of steps, rows or tiles changes, and large ones in several layouts."""
    wrong = []
    for dtype in (torch.uint8, torch.bfloat16, torch.complex128):
        slot = SLOT_BYTES // dtype.itemsize
        for count in (slot - 1, slot, slot + 1, 2 * slot, 3 * slot + 5, *ROWS.get(dtype, ())):
            values = random_bytes(ctx.world, (count,), dtype)
            layout = testing.layouts((count,))["offset"]
            call = CfgBroadcast(name_of(dtype, count), values, [layout] * ctx.world, ctx.group.group_name, ctx.rank)
            wrong += run_calls(ctx, [call])
    values = random_bytes(ctx.world, (7, (2**19 + 3) // 7), torch.float32)
    return wrong + run_calls(ctx, calls_of_every_layout(ctx, CfgBroadcast, "large", values))


def lazy_views(ctx: RankContext) -> list[str]:
    """A conjugate and a negation that torch has not carried out yet, sent, and received into."""
    wrong = []
    for name, view in (("conj", Tensor.conj), ("conj.imag", lambda z: z.conj().imag)):
        x = torch.view_as_complex(torch.arange(12.0).view(6, 2)).to(ctx.device) + ctx.rank
        expected = view(x - ctx.rank).clone().resolve_conj().resolve_neg()
        wrong += difference(sgl_comm.ops.cfg_broadcast(view(x), 0, ctx.group.group_name), expected, name)
        sgl_comm.ops.cfg_broadcast_(view(x), 0, ctx.group.group_name)
        wrong += difference(view(x).resolve_conj().resolve_neg(), expected, f"{name}, in place")
    return wrong


def source_runs_ahead(ctx: RankContext, count: int, late: int) -> list[str]:
    """Calls without a pause, each with numbers of its own, and one rank late: a slot used again too early shows."""
    wrong = []
    for call in range(count):
        src = call // 7 % ctx.world
        x = torch.full((SLOT_BYTES // 4 + 1,), float(call if ctx.rank == src else -1), device=ctx.device)
        if ctx.rank == late and call % 10 == 3:
            time.sleep(0.002)
        if call % 5 == 4:  # between broadcasts, what writes every rank's slot
            total = torch.ops.sgl_comm.all_reduce(torch.ones(5000, device=ctx.device), ctx.group.group_name)
            wrong += [] if total.unique().tolist() == [ctx.world] else [f"sum {call}: got {total.unique().tolist()}"]
        sgl_comm.ops.cfg_broadcast_(x, src, ctx.group.group_name)
        wrong += [] if x.unique().tolist() == [call] else [f"call {call}: got {x.unique().tolist()[:3]}"]
    return wrong


def refusals(ctx: RankContext) -> dict[str, str]:
    """Bad arguments on every rank: what was bad -> the error. After each, calls work."""
    name, x = ctx.group.group_name, torch.ones(4, 3, device=ctx.device)
    ops = sgl_comm.ops
    bad = {
        "wrong src": lambda: ops.cfg_broadcast(x, ctx.world, name),
        "negative src": lambda: ops.cfg_broadcast_(x, -1, name),
        "grad": lambda: ops.cfg_broadcast(x.clone().requires_grad_(), 0, name),
        "overlap": lambda: ops.cfg_broadcast_(x[:1].expand(4, 3), 0, name),
        "sparse": lambda: ops.cfg_broadcast(x.to_sparse(), 0, name),
        "unknown group": lambda: ops.cfg_broadcast(x, 0, "nowhere"),
    }
    texts = {}
    for what, call in bad.items():
        texts[what] = error_text(call)
        values = torch.full((3,), float(ctx.rank), device=ctx.device)
        ops.cfg_broadcast_(values, ctx.world - 1, name)
        if values.tolist() != [ctx.world - 1] * 3:
            texts[what] = f"the call afterwards gave {values.tolist()}"
    return texts


def errors_where_rank_0_differs(ctx: RankContext, what: str) -> list[str]:
    """Every rank broadcasts 1000 float32 from rank 0, which makes another call; then all sum. Each call's error."""
    group = dist.new_group(list(range(ctx.world)))
    x = torch.ones(1000)
    with sgl_comm.init(group) as comm:
        others = {
            "refused": lambda: comm.cfg_broadcast_(torch.ones(1).expand(1000), 0),
            "count": lambda: comm.cfg_broadcast(torch.ones(1001), 0),
            "dtype": lambda: comm.cfg_broadcast(x.int(), 0),
            "src": lambda: comm.cfg_broadcast(x, 1),
            "op": lambda: comm.all_gather(x),
        }
        first = error_text(others[what] if ctx.rank == 0 else lambda: comm.cfg_broadcast(x, 0))
        second = error_text(lambda: comm.all_reduce(x))
        dist.barrier(ctx.group)
    with sgl_comm.init(group) as comm:
        assert comm.all_reduce(torch.ones(3)).tolist() == [ctx.world] * 3
    dist.destroy_process_group(group)
    return [first, second]


def errors_where_rank_0_refuses_and_stays_away(ctx: RankContext) -> str:
    group = dist.new_group(list(range(ctx.world)))
    os.environ["SGLCOMM_TIMEOUT"] = "1"
    comm = sgl_comm.init(group)
    del os.environ["SGLCOMM_TIMEOUT"]
    x = torch.ones(1).expand(8) if ctx.rank == 0 else torch.ones(8)
    text = error_text(lambda: comm.cfg_broadcast_(x, 0))
    dist.barrier(ctx.group)
    comm.close()
    dist.destroy_process_group(group)
    return text


def after_a_source_on_the_wrong_device(ctx: RankContext, how: str) -> list[str]:
    """Rank 0 sends ones on the other device than its peers expect them, then thousands on theirs. Errors; wrong values.

    ``how`` is the device of the peers.
    """
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLCOMM_TIMEOUT", "1")
        comm = sgl_comm.init(group, ctx.device)
    device, other = (ctx.device, "cpu") if how == "cuda" else ("cpu", ctx.device)
    values = (1.0, 1000.0) if ctx.rank == 0 else (-1.0, -2.0)
    passed = [torch.full((1000,), value, device=device) for value in values]
    if ctx.rank == 0:
        passed[0] = passed[0].to(other)
    texts = [error_text(lambda x=x: comm.cfg_broadcast_(x, 0)) for x in passed]
    synchronize(ctx)
    texts.append(error_text(lambda: comm.cfg_broadcast_(passed[1], 0)))
    got = set(passed[0].tolist()) - {-1.0, 1.0}
    texts += [f"got {got}"] if any(number == number for number in got) else []
    dist.barrier(ctx.group)
    comm.close()
    dist.destroy_process_group(group)
    return texts


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["cuda", "cpu"])
@pytest.mark.parametrize("world", [2, 3])
def test_after_a_source_on_the_wrong_device_nobody_gets_another_calls_values(world: int, how: str) -> None:
    for texts in Ranks("cuda", world).run(after_a_source_on_the_wrong_device, how, deadline=60):
        assert len(texts) == 3, texts
        assert any(texts), texts


@every_world
def test_every_dtype_size_and_layout(ranks: Ranks) -> None:
    ranks.all_right(run_every_layout, CfgBroadcast, SHAPES, EVERY_DTYPE)


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (2, 3)), *ranks_on("cuda", (2,))])
def test_the_own_backend_serves_where_shared_memory_does_not(ranks: Ranks) -> None:
    ranks.all_right(by_the_own_backend)


def test_the_source_is_a_rank_of_the_group() -> None:
    Ranks("cpu", 3).all_right(in_a_group_of_some)


@every_world
def test_sizes_around_the_chunk_and_a_large_one(ranks: Ranks) -> None:
    ranks.all_right(around_the_chunk)


@every_world
def test_no_value_is_changed(ranks: Ranks) -> None:
    ranks.all_right(run_signal_like_values, CfgBroadcast)


@every_world
def test_lazy_conjugates_and_negations(ranks: Ranks) -> None:
    ranks.all_right(lazy_views)


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (2, 3, 4)), *ranks_on("cuda", (2, 3))])
@pytest.mark.parametrize("late", [0, 1])
def test_a_source_that_runs_ahead_overwrites_nothing(ranks: Ranks, late: int) -> None:
    ranks.all_right(source_runs_ahead, 200, late)


@every_world
def test_200_calls_among_others_on_one_communicator(ranks: Ranks) -> None:
    ranks.all_right(interleaved, [CfgBroadcast, CfgAllReduce, AllGather, AllReduce], 200)


@some_worlds
def test_what_every_rank_refuses_leaves_the_group_as_it_was(ranks: Ranks) -> None:
    words = {
        "wrong src": f"sgl_comm::cfg_broadcast: got src {ranks.world}; expected a rank of the group, 0 to",
        "negative src": "sgl_comm::cfg_broadcast_: got src -1; expected a rank of the group, 0 to",
        "grad": "sgl_comm::cfg_broadcast: got float32[4, 3] on cpu that requires grad; expected one that does not",
        "overlap": "sgl_comm::cfg_broadcast_: got float32[4, 3] on cpu in which several elements share memory",
        "sparse": "sgl_comm::cfg_broadcast: got a tensor without strides",
        "unknown group": "sgl_comm::cfg_broadcast: unknown group 'nowhere'; call sgl_comm.init(group) first",
    }
    for texts in ranks.run(refusals):
        assert texts.keys() == words.keys()
        for what, text in texts.items():
            assert text.startswith(words[what].replace("on cpu", f"on {ranks.device}"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("count", "called cfg_broadcast of 1001 float32 from rank 0"),
        ("dtype", "called cfg_broadcast of 1000 int32 from rank 0"),
        ("src", "called cfg_broadcast of 1000 float32 from rank 1"),
        ("op", "called all_gather of 1000 float32"),
        ("refused", "rank 0 has refused a call that rank"),
    ],
)
def test_ranks_that_differ_all_get_an_error(world: int, what: str, words: str) -> None:
    """At the latest in the next call: the source does not wait for its peers."""
    first, *peers = Ranks("cpu", world).run(errors_where_rank_0_differs, what, deadline=30)
    if what == "refused":
        assert first.pop(0).startswith("sgl_comm::cfg_broadcast_: got float32[1000] on cpu in which several elements")
    for texts in (first, *peers):
        text = next(filter(None, texts))
        assert words in text
        if what != "refused":
            assert "called cfg_broadcast of 1000 float32 from rank 0" in text
        assert texts[-1], "and nothing works from then on"


@pytest.mark.parametrize("world", [2, 3])
def test_peers_of_one_that_refused_and_stays_away_get_an_error_at_the_deadline(world: int) -> None:
    first, *peers = Ranks("cpu", world).run(errors_where_rank_0_refuses_and_stays_away, deadline=30)
    assert "several elements share memory" in first
    for text in peers:
        assert "waited 1 s (SGLCOMM_TIMEOUT) for rank 0, which never came to call 1 (cfg_broadcast of 8 float32" in text
