"""The push kernels on simulated ranks: several communicators in one process on one GPU, truly at once."""

from __future__ import annotations

import pytest
import torch

import sgl_comm
from sgl_comm import reference
from sgl_comm.testing import SimulatedRank, assert_bits_equal, make_simulated, special_values

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOT_BYTES = 1 << 20
COUNTS = (1, 7, 8, 1000, 1040, 65536, (1 << 20) + 3)
"""In elements; the last ones go through the ring."""


def inputs_of(world: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    special = special_values(dtype)
    tensors = [torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(world)]
    for rank, tensor in enumerate(tensors):
        some = special.roll(rank)[:count]
        tensor[: some.numel()] = some
    return [tensor.cuda() for tensor in tensors]


def call_all(ranks: list[SimulatedRank], inputs: list[torch.Tensor], algo: str) -> list[torch.Tensor]:
    outputs = []
    torch.cuda.synchronize()
    for rank, tensor in zip(ranks, inputs, strict=True):
        with torch.cuda.stream(rank.stream):
            outputs.append(torch.ops.sgl_comm.custom_all_reduce_v2(tensor, rank.group_name, algo))
    torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_algorithm_gives_the_bits_of_the_oracle(world: int, dtype: torch.dtype) -> None:
    with make_simulated(world, max_size=SLOT_BYTES) as ranks:
        for count in COUNTS:
            inputs = inputs_of(world, count, dtype)
            expected = reference.all_reduce([tensor.cpu() for tensor in inputs])
            fits = count * dtype.itemsize <= SLOT_BYTES
            for algo in ("auto", "ring", "one_shot") if fits else ("auto", "ring"):
                for output in call_all(ranks, inputs, algo):
                    assert_bits_equal(output.cpu(), expected)
        assert [rank.fault() for rank in ranks] == [""] * world


@pytest.mark.parametrize("world", [2, 5])
def test_sizes_and_algorithms_may_alternate(world: int) -> None:
    generator = torch.Generator().manual_seed(1)
    with make_simulated(world, max_size=SLOT_BYTES) as ranks:
        for _ in range(100):
            count = int(2 ** (torch.rand(1, generator=generator).item() * 21))
            inputs = inputs_of(world, count, torch.bfloat16)
            algo = "ring" if torch.rand(1, generator=generator).item() < 0.5 else "auto"
            expected = reference.all_reduce([tensor.cpu() for tensor in inputs])
            for output in call_all(ranks, inputs, algo):
                assert_bits_equal(output.cpu(), expected)


def test_graphs_replay_with_changed_inputs() -> None:
    world, count = 4, 5000
    with make_simulated(world) as ranks:
        inputs = [torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in ranks]
        graphs, outputs = [], []
        for rank, tensor in zip(ranks, inputs, strict=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=rank.stream):
                once = torch.ops.sgl_comm.all_reduce(tensor, rank.group_name)
                outputs.append(torch.ops.sgl_comm.all_reduce(once, rank.group_name))
            graphs.append(graph)
        for seed in range(20):
            for rank, tensor in enumerate(inputs):
                tensor.copy_(torch.randn(count, generator=torch.Generator().manual_seed(world * seed + rank)))
            torch.cuda.synchronize()
            for rank, graph in zip(ranks, graphs, strict=True):
                with torch.cuda.stream(rank.stream):
                    graph.replay()
            torch.cuda.synchronize()
            once = reference.all_reduce([tensor.cpu() for tensor in inputs])
            for output in outputs:
                assert_bits_equal(output.cpu(), reference.all_reduce([once] * world))


def test_a_rank_that_does_not_come_ends_in_nan_and_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGL_COMM_TIMEOUT", "0.5")
    with make_simulated(3) as ranks:
        x = torch.ones(1000, device="cuda")
        outputs = [ranks[0].all_reduce(x), ranks[1].all_reduce(x)]
        torch.cuda.synchronize()
        assert all(output.isnan().all() for output in outputs)
        assert "rank 2, which never came" in ranks[0].fault()
        with pytest.raises(RuntimeError, match="rank 2, which never came"):
            ranks[0].all_reduce(x)
        late = ranks[2].all_reduce(x)
        torch.cuda.synchronize()
        assert late.isnan().all()
        assert "rank 2, which never came" in ranks[2].fault()
    assert torch.ones(4, device="cuda").sum().item() == 4


def test_an_algorithm_that_does_not_fit_is_refused() -> None:
    with make_simulated(2, max_size=65536) as ranks:
        x = torch.ones(1 << 20, device="cuda")
        with pytest.raises(sgl_comm.SglCommError, match="custom_all_reduce_v2: got algo 'one_shot' for 4194304 bytes"):
            sgl_comm.ops.custom_all_reduce_v2(x, ranks[0].group_name, "one_shot")
        with pytest.raises(sgl_comm.SglCommError, match="expected auto, one_shot or ring"):
            sgl_comm.ops.custom_all_reduce_v2(x, ranks[0].group_name, "tree")
        with pytest.raises(sgl_comm.SglCommError, match="expected float32, bfloat16 or float16"):
            sgl_comm.ops.custom_all_reduce_v2(x.int(), ranks[0].group_name)
