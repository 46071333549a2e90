"""The CUDA kernels on simulated ranks: several communicators in one process on one GPU, truly at once.

These are the tests that compute-sanitizer runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

import sgl_comm
from helpers.values import layouts_of_ranks
from sgl_comm import reference
from sgl_comm.backends.thresholds import thresholds_for
from sgl_comm.testing import SimulatedRank, assert_bits_equal, capture_simulated, make_simulated, special_values

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"small": (1 << 16, (1, 7, 8, 1000, 1040, 40_000)), "large": (1 << 19, (65536, (1 << 20) + 3))}
"""max_size, and counts of elements; the last go through a ring."""
ALGORITHMS = ("one_shot", "two_shot", "one_shot_ring", "two_shot_ring")

Call = Callable[[torch.Tensor, str], torch.Tensor]
ops = torch.ops.sgl_comm


def v2(algo: str) -> Call:
    return lambda x, group_name: ops.custom_all_reduce_v2(x, group_name, algo)


SUMS: dict[str, Call] = {
    "all_reduce": lambda x, group_name: ops.all_reduce(x, group_name),
    "v1": lambda x, group_name: ops.custom_all_reduce_v1(x, group_name),
    **{algo: v2(algo) for algo in ALGORITHMS},
}


def inputs_of(world: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    special = special_values(dtype)
    tensors = [torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(world)]
    for rank, tensor in enumerate(tensors):
        some = special.roll(rank)[:count]
        tensor[: some.numel()] = some
    return [tensor.cuda() for tensor in tensors]


def take_memory(rank: SimulatedRank, sizes: Sequence[int]) -> None:
    """So that no call has to ask the driver for so many bytes: under initcheck that waits for the ranks before it."""
    with torch.cuda.stream(rank.stream):
        held = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    del held


def call_all(ranks: Sequence[SimulatedRank], inputs: Sequence[torch.Tensor], call: Call) -> list[torch.Tensor]:
    outputs = []
    for rank, tensor in zip(ranks, inputs, strict=True):
        take_memory(rank, (tensor.nbytes // rank.world, tensor.nbytes, tensor.nbytes * rank.world))
    torch.cuda.synchronize()
    for rank, tensor in zip(ranks, inputs, strict=True):
        with torch.cuda.stream(rank.stream):
            outputs.append(call(tensor, rank.group_name))
    torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_algorithm_gives_the_bits_of_the_oracle(size: str, dtype: torch.dtype, world: int) -> None:
    max_size, counts = SIZES[size]
    with make_simulated(world, max_size=max_size) as ranks:
        for count in counts:
            inputs = inputs_of(world, count, dtype)
            expected = reference.all_reduce(inputs)
            for name, call in SUMS.items():
                for output in call_all(ranks, inputs, call):
                    assert_bits_equal(output, expected, f"{name}, {count}")
        assert [rank.fault() for rank in ranks] == [""] * world


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_halves_give_the_bits_of_the_oracle(size: str, dtype: torch.dtype, world: int) -> None:
    """Reduce-scatter of ``count`` elements a rank; all-gather of ``count`` words, many of them the sentinel."""
    words = torch.int32 if dtype.itemsize == 4 else torch.int16
    max_size, counts = SIZES[size]
    with make_simulated(world, max_size=max_size) as ranks:
        for count in counts:
            inputs = inputs_of(world, world * count, dtype)
            for rank, output in enumerate(call_all(ranks, inputs, ops.reduce_scatter)):
                expected = reference.all_reduce([x[rank * count : (rank + 1) * count] for x in inputs])
                assert_bits_equal(output, expected, f"reduce_scatter, {count}")
            values = [x[:count].view(words).clone() for x in inputs]
            for rank, value in enumerate(values):
                value[rank % 3 :: 3] = -1
            for pieces in (values, [value.view(torch.uint8)[1:] for value in values]):
                for output in call_all(ranks, pieces, ops.all_gather):
                    assert_bits_equal(output, torch.cat(pieces), f"all_gather, {count}")
        assert [rank.fault() for rank in ranks] == [""] * world


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_broadcast_keeps_every_bit(size: str, world: int) -> None:
    """Words of which many are the sentinel, as packs and as bytes at odd addresses, from each rank by turns."""
    max_size, counts = SIZES[size]
    with make_simulated(world, max_size=max_size) as ranks:
        for number, count in enumerate(counts):
            values = [x.view(torch.int32).clone() for x in inputs_of(world, count, torch.float32)]
            for rank, value in enumerate(values):
                value[rank % 3 :: 3] = -1
            for turn, pieces in enumerate((values, [value.view(torch.uint8)[1:] for value in values])):
                src = (number + turn) % world
                for output in call_all(ranks, pieces, lambda x, name, src=src: ops.cfg_broadcast(x, src, name)):
                    assert_bits_equal(output, pieces[src], f"{count} from {src}")
        assert [rank.fault() for rank in ranks] == [""] * world


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 9), (2, 4, 10, 13), (3, 40, 201)], ids=str)
def test_strides_are_walked_and_what_lies_between_stays(shape: tuple[int, ...], dtype: torch.dtype, world: int) -> None:
    """In place, in every layout, and in another on each rank. What is walked needs no memory."""

    def num_allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    def without_memory(call: Call) -> Call:
        def checked(x: torch.Tensor, group_name: str) -> torch.Tensor:
            before = num_allocations()
            output = call(x, group_name)
            assert num_allocations() == before, "the tensor was copied"
            return output

        return checked

    values = [x.view(shape) for x in inputs_of(world, torch.Size(shape).numel(), dtype)]
    with make_simulated(world) as ranks:
        for number, (names, layouts) in enumerate(layouts_of_ranks(shape, world, in_place=True)):
            src = number % world
            for name, call, expected in (
                ("all_reduce_", ops.all_reduce_, reference.all_reduce(values)),
                ("cfg_broadcast_", lambda x, group, src=src: ops.cfg_broadcast_(x, src, group), values[src]),
            ):
                placed = [layout(value) for layout, value in zip(layouts, values, strict=True)]
                call_all(ranks, [each.tensor for each in placed], without_memory(call))
                for each in placed:
                    assert_bits_equal(each.tensor, expected, f"{name}, {names}")
                    each.assert_canaries()
        assert [rank.fault() for rank in ranks] == [""] * world


def broadcasts_of_one(rank: SimulatedRank, count: int, ones: torch.Tensor) -> list[torch.Tensor]:
    """Broadcasts of the call's number from one rank after the other, with a sum after every fifth."""
    outputs = []
    with torch.cuda.stream(rank.stream):
        for number in range(count):
            src = number // 3 % rank.world
            sent = ones * (number if rank.rank == src else -1)
            outputs.append(ops.cfg_broadcast(sent, src, rank.group_name))
            if number % 5 == 4:
                outputs.append(ops.all_reduce(ones, rank.group_name))
    return outputs


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("elements", [24, 40_000, 300_000])
def test_a_source_that_runs_ahead_overwrites_nothing(elements: int, late: int, world: int) -> None:
    count, ones = 40, torch.ones(elements, device="cuda")
    with make_simulated(world) as ranks:
        for rank in ranks:
            take_memory(rank, [ones.nbytes] * 3 * count)
        torch.cuda.synchronize()
        outputs = {}
        for rank in sorted(ranks, key=lambda rank: rank.rank == late):
            if rank.rank == late:
                time.sleep(0.02)
            outputs[rank.rank] = broadcasts_of_one(rank, count, ones)
        torch.cuda.synchronize()
        assert [rank.fault() for rank in ranks] == [""] * world
        wanted = [[number] + [world] * (number % 5 == 4) for number in range(count)]
        for rank, got in outputs.items():
            assert [x.unique().tolist() for x in got] == [[float(x)] for each in wanted for x in each], rank


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_broadcast_that_misses_a_rank_fails_softly(missing: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of what needs more places than there are, and receivers, name the rank that did not come."""
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    with make_simulated(world) as ranks:
        x = torch.ones(5_000_000, device="cuda")
        present = [rank for rank in ranks if rank.rank != missing]
        outputs = call_all(present, [x] * len(present), lambda x, name: ops.cfg_broadcast(x, 0, name))
        for rank, output in zip(present, outputs, strict=True):
            assert output[-1].isnan()
            assert f"waited 0.5 s (SGLCOMM_TIMEOUT) for rank {missing}, which never came (cfg_broadcast" in rank.fault()
    assert torch.ones(4, device="cuda").sum().item() == 4


def overlapping(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.numel())


@pytest.mark.parametrize("cfg", [ops.cfg_all_reduce_, lambda x, name: ops.cfg_broadcast_(x, 0, name)])
def test_what_every_rank_refuses_leaves_the_group_as_it_was(cfg: Call) -> None:
    x = torch.ones(1000, device="cuda")
    with make_simulated(3) as ranks:
        for refusals in range(1, 40):
            for rank in ranks:
                for _ in range(refusals % 3 + 1):
                    with pytest.raises(RuntimeError, match="several elements share memory"):
                        cfg(overlapping(x), rank.group_name)
            assert all(output.eq(3).all() for output in call_all(ranks, [x] * 3, SUMS["all_reduce"]))
        for rank in ranks:  # more than are kept
            for _ in range(200):
                with pytest.raises(RuntimeError, match="several elements share memory"):
                    cfg(overlapping(x), rank.group_name)
        assert all(output.eq(3).all() for output in call_all(ranks, [x] * 3, SUMS["v1"]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU, of which the group is not")
@pytest.mark.parametrize("cfg", [ops.cfg_all_reduce, lambda x, name: ops.cfg_broadcast(x, 0, name)])
def test_a_tensor_of_another_gpu_is_refused_and_counted(cfg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    x, other = torch.ones(1000, device="cuda:0"), torch.ones(1000, device="cuda:1")
    with make_simulated(2) as ranks:
        for rank in ranks:
            with pytest.raises(RuntimeError, match=r"got float32\[1000\] on cuda:1; expected device cuda:0"):
                cfg(other, rank.group_name)
        assert all(output.eq(2).all() for output in call_all(ranks, [x, x], SUMS["all_reduce"]))
        with pytest.raises(RuntimeError, match="expected device cuda:0"):
            cfg(other, ranks[0].group_name)
        with pytest.raises(RuntimeError, match="rank 0 has refused a call that rank 1 has not"):
            ops.all_reduce(x, ranks[0].group_name)


@pytest.mark.parametrize("name", ["all_reduce", "v1"])
def test_what_one_rank_refuses_ends_the_group_and_no_sum_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    x = torch.ones(1000, device="cuda")
    with make_simulated(2) as ranks:
        for rank in ranks if name == "v1" else []:
            ops._cuda_settle(rank.group_name, "push", False, "the test wants it so")
        (first,) = call_all(ranks[1:], [x * 5], ops.cfg_all_reduce)
        with pytest.raises(RuntimeError, match="several elements share memory"):
            ops.cfg_all_reduce_(overlapping(x), ranks[0].group_name)
        with pytest.raises(RuntimeError, match="rank 0 has refused a call that rank 1 has not"):
            ops.all_reduce(x, ranks[0].group_name)
        assert first.isnan().all()
        assert "for rank 0, which never came" in ranks[1].fault()
        with pytest.raises(RuntimeError, match="for rank 0, which never came"):
            ops.all_reduce(x, ranks[1].group_name)


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_refusals_of_different_calls_are_told_apart(apart: bool, v1: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank refuses once; where one has made a call in between, that is no agreement."""
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    x = torch.ones(1000, device="cuda")

    def refuse(rank: SimulatedRank) -> None:
        with pytest.raises(RuntimeError, match="several elements share memory"):
            ops.cfg_all_reduce_(overlapping(x), rank.group_name)

    with make_simulated(2) as ranks:
        for rank in ranks if v1 else []:
            ops._cuda_settle(rank.group_name, "push", False, "the test wants it so")
        refuse(ranks[0])
        if apart:
            call_all(ranks[1:], [x], ops.cfg_all_reduce)
        refuse(ranks[1])
        if not apart:
            assert all(output.eq(2).all() for output in call_all(ranks, [x, x], ops.cfg_all_reduce))
            return
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 0 has refused a call that rank 1 has not"):
            ops.all_reduce(x, ranks[0].group_name)
        assert time.monotonic() - start < 0.4, "known at once"


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_shot_bytes", [16, 1 << 30], ids=["two_shot", "one_shot"])
def test_the_norm_has_the_bits_of_the_oracle(one_shot_bytes: int, dtype: torch.dtype, world: int) -> None:
    with make_simulated(world, max_size=1 << 18, one_shot_bytes=one_shot_bytes) as ranks:
        for tokens, hidden, norm in (
            (1, 64, "rms"),
            (3, 4096, "layer"),
            (7, 8192, "rms"),
            (2, 16384, "rms"),
            (5, 577, "layer"),
            (60, 2048, "layer"),
        ):
            states = [x.view(tokens, hidden) for x in inputs_of(world, tokens * hidden, dtype)]
            residual, weight = torch.randn(tokens, hidden).to(dtype), torch.randn(hidden)
            args = (residual, weight, None, 1e-6, norm)
            expected = reference.tp_attn_all_reduce_and_layernorm([x.cpu() for x in states], *args)
            on_gpu = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]

            def call(x: torch.Tensor, group_name: str, args: list = on_gpu) -> tuple[torch.Tensor, torch.Tensor]:
                return ops.tp_attn_all_reduce_and_layernorm(x, *args, group_name=group_name)

            for outputs in call_all(ranks, states, call):
                for got, want in zip(outputs, expected, strict=True):
                    assert_bits_equal(got, want, f"{tokens} x {hidden}, {norm}")
        assert [rank.fault() for rank in ranks] == [""] * world


@pytest.mark.parametrize("one_shot_bytes", [16, 1 << 30])
def test_the_threshold_chooses_and_the_bits_stay(one_shot_bytes: int) -> None:
    with make_simulated(4, max_size=1 << 19, one_shot_bytes=one_shot_bytes) as ranks:
        plain, ring = ("one_shot", "one_shot_ring") if one_shot_bytes > 1 << 20 else ("two_shot", "two_shot_ring")
        assert ops._cuda_algorithm(ranks[0].group_name, 4096) == plain
        assert ops._cuda_algorithm(ranks[0].group_name, 64 << 20) == ring
        for count in (5000, (1 << 20) + 3):
            inputs = inputs_of(4, count, torch.bfloat16)
            for output in call_all(ranks, inputs, SUMS["all_reduce"]):
                assert_bits_equal(output, reference.all_reduce(inputs))


def test_a_ring_serves_what_would_fit_where_it_is_faster() -> None:
    world, limit = 4, thresholds_for(4, torch.cuda.get_device_capability()).ring_bytes
    with make_simulated(world) as ranks:
        chosen = [ops._cuda_algorithm(ranks[0].group_name, num_bytes) for num_bytes in (limit, limit + 2)]
        assert chosen == ["two_shot", "two_shot_ring"]
        for count in (limit // 2, limit // 2 + 1):
            inputs = inputs_of(world, count, torch.bfloat16)
            for output in call_all(ranks, inputs, SUMS["all_reduce"]):
                assert_bits_equal(output, reference.all_reduce(inputs))


@pytest.mark.parametrize("call", [SUMS["all_reduce"], SUMS["v1"]], ids=["v2", "v1"])
def test_graphs_replay_with_changed_inputs(call: Call) -> None:
    world, count = 4, 5000
    with make_simulated(world) as ranks:
        inputs = [torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in ranks]
        graphs, outputs = [], []
        with capture_simulated(ranks):
            for rank, tensor in zip(ranks, inputs, strict=True):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=rank.stream):
                    outputs.append(call(call(tensor, rank.group_name), rank.group_name))
                graphs.append(graph)
        for seed in range(20):
            for rank, tensor in enumerate(inputs):
                tensor.copy_(torch.randn(count, generator=torch.Generator().manual_seed(world * seed + rank)))
            torch.cuda.synchronize()
            for rank, graph in zip(ranks, graphs, strict=True):
                with torch.cuda.stream(rank.stream):
                    graph.replay()
            torch.cuda.synchronize()
            once = reference.all_reduce(inputs)
            for output in outputs:
                assert_bits_equal(output, reference.all_reduce([once] * world))


def sums_and_norms(rank: SimulatedRank, order: Sequence[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """The results of a norm of each matrix and an all-reduce of each vector, twice over."""
    outputs = []
    with torch.cuda.stream(rank.stream):
        for x in [*order, *order]:
            if x.dim() == 1:
                outputs.append(ops.all_reduce(x, rank.group_name))
            else:
                norm = ops.tp_attn_all_reduce_and_layernorm
                outputs += norm(x, x, weight, None, 1e-6, group_name=rank.group_name)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_a_rank_that_comes_late_finds_room(world: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others' launches, and the next beside them, lie on the device and wait: large blocks between small ones."""
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "5")
    hidden = 4096
    weight = torch.ones(hidden, dtype=dtype, device="cuda")
    large, small, stepped = (inputs_of(world, count, dtype) for count in (155_000, 1000, 30_000))
    stepped[1::2] = [torch.stack([x, x], 1)[:, 0] for x in stepped[1::2]]
    with make_simulated(world) as ranks:
        for rows in (4, 16, 33, 44, 132):
            matrices = [x.view(rows, hidden) for x in inputs_of(world, rows * hidden, dtype)]
            for kinds in ([large, matrices], [small, matrices], [matrices, large, small], [stepped, matrices]):
                orders = list(zip(*kinds, strict=True))
                for rank in ranks:
                    take_memory(rank, 2 * [x.nbytes for x in orders[0] for _ in range(x.dim())])
                torch.cuda.synchronize()
                first = [sums_and_norms(rank, orders[rank.rank], weight) for rank in ranks]  # loads the kernels
                torch.cuda.synchronize()
                expected = [[output.clone() for output in outputs] for outputs in first]
                del first
                got = [sums_and_norms(rank, orders[rank.rank], weight) for rank in ranks[:-1]]
                time.sleep(0.02)
                got.append(sums_and_norms(ranks[-1], orders[-1], weight))
                torch.cuda.synchronize()
                assert [rank.fault() for rank in ranks] == [""] * world, f"{rows} rows, {len(kinds)} calls"
                for mine, wanted in zip(got, expected, strict=True):
                    for x, y in zip(mine, wanted, strict=True):
                        assert_bits_equal(x, y, f"{rows} rows, {len(kinds)} calls")


@pytest.mark.parametrize("name", ["one_shot", "two_shot", "one_shot_ring", "two_shot_ring", "v1"])
def test_a_rank_that_does_not_come_ends_in_nan_and_an_error_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    call = SUMS[name]
    with make_simulated(3) as ranks:
        x = torch.ones(1000, device="cuda")
        outputs = call_all(ranks[:2], [x, x], call)
        assert all(output.isnan().all() for output in outputs)
        assert "rank 2, which never came" in ranks[0].fault()
        with pytest.raises(RuntimeError, match=r"rank 0: .*rank 2, which never came"):
            call(x, ranks[0].group_name)
        (late,) = call_all(ranks[2:], [x], call)
        assert late.isnan().all()
        assert "rank 2, which never came" in ranks[2].fault()
    assert torch.ones(4, device="cuda").sum().item() == 4


@pytest.mark.parametrize(("op", "name"), [(ops.reduce_scatter, "reduce_scatter"), (ops.all_gather, "all_gather")])
def test_the_halves_fail_softly_too(op: Call, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "0.5")
    with make_simulated(3) as ranks:
        x = torch.ones(999, device="cuda")
        outputs = call_all(ranks[:2], [x, x], op)
        assert all(output[-1].isnan() for output in outputs)
        assert f"rank 2, which never came ({name}, call 1" in ranks[0].fault()
    assert torch.ones(4, device="cuda").sum().item() == 4


def test_an_unknown_algorithm_or_dtype_is_refused() -> None:
    with make_simulated(2, max_size=65536) as ranks:
        x = torch.ones(1 << 20, device="cuda")
        for wrapper in (sgl_comm.ops.custom_all_reduce_v1, sgl_comm.ops.custom_all_reduce_v2):
            with pytest.raises(sgl_comm.SglCommError, match="expected float32, bfloat16 or float16"):
                wrapper(x.int(), ranks[0].group_name)
        with pytest.raises(sgl_comm.SglCommError, match="got algo 'tree'; expected auto, one_shot, two_shot"):
            sgl_comm.ops.custom_all_reduce_v2(x, ranks[0].group_name, "tree")
