"""Guidance over ranks: the branches' sum, and a denoiser whose ranks have a branch each, against one rank with all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import difference
from helpers.errors import error_text
from helpers.ranks import Ranks, capturing, ranks_on, synchronize
from helpers.values import DTYPES, generator, name_of, random_values
from sgl_comm import CfgGroup, reference
from sgl_comm.models import Dit, DitConfig, denoise, denoise_step
from sgl_comm.testing import RankContext

BOUND = 1e-5
"""How far a result may be from the one rank's, as a part of the largest number, where matrices are of other shapes."""

SCALE, STEPS = 4.5, 3


@contextmanager
def alone(ctx: RankContext) -> Iterator[sgl_comm.Communicator]:
    """A communicator of this rank."""
    groups = [dist.new_group([rank]) for rank in range(ctx.world)]
    with sgl_comm.init(groups[ctx.rank], ctx.device) as comm:
        yield comm
    dist.barrier(ctx.group)
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def combined(ctx: RankContext) -> list[str]:
    """A branch a rank and all branches on one: the same bits, whatever the strides, and near the formula."""
    assert ctx.comm is not None
    wrong = []
    branches = max(2, ctx.world)
    weights = (SCALE, 1 - SCALE) if branches == 2 else [0.5, 3.0, -2.5]
    with alone(ctx) as own:
        together, one = CfgGroup(ctx.comm, branches), CfgGroup(own, branches)
        for dtype in DTYPES:
            values = random_values(branches, (2, 3, 4, 6), dtype)
            batch = torch.cat(values)
            expected = reference.all_reduce([x * weight for x, weight in zip(values, weights, strict=True)])
            for name, laid_out in (("row-major", Tensor.contiguous), ("channels last", channels_last)):
                x = laid_out(batch.to(ctx.device))
                for group in (together, one):
                    scale = SCALE if branches == 2 else weights
                    found = group.combine(laid_out(group.split(x)), scale)
                    wrong += difference(found.cpu(), expected, name_of(dtype, name, group.num_local, "branches here"))
            if branches == 2 and dtype == torch.float32:
                formula = values[1].double() + SCALE * (values[0].double() - values[1].double())
                largest = max(float(x.abs().max()) for x in values)
                assert (expected.double() - formula).abs().max() <= 4 * SCALE * torch.finfo(dtype).eps * largest
    return wrong


def errors(ctx: RankContext) -> list[str]:
    assert ctx.comm is not None
    comm = ctx.comm
    with alone(ctx) as own:
        one = CfgGroup(own)
        return [
            error_text(lambda: CfgGroup(own, 1)),
            error_text(lambda: CfgGroup(comm, ctx.world + 1)),
            error_text(lambda: one.split(torch.ones(3, 2))),
            error_text(lambda: one.split(torch.tensor(1.0))),
            error_text(lambda: one.combine(torch.ones(4, 2), [1.0, 2.0, 3.0])),
            error_text(lambda: CfgGroup(own, 3).combine(torch.ones(3, 2), 2.0)),
            error_text(lambda: one.combine(torch.ones(4, 2, dtype=torch.float64), 2.0)),
        ]


def noise_and_conditions(device: torch.device) -> tuple[Tensor, Tensor]:
    random_bits = generator("denoiser")
    condition = torch.randn(2, DitConfig().hidden_size, generator=random_bits)
    latents = torch.randn(2, 4, 8, 8, generator=random_bits)
    return latents.to(device), torch.cat([condition, torch.zeros_like(condition)]).to(device)


def branch_by_branch(model: Dit) -> Dit:
    """The model called once for each branch: matrices of the shapes that ranks with a branch each have."""

    class OneByOne(Dit):
        def __init__(self) -> None:
            self.__dict__ = model.__dict__

        def __call__(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            parts = zip(latents.chunk(2), time.chunk(2), condition.chunk(2), strict=True)
            return torch.cat([model(*part) for part in parts])

    return OneByOne()


def far(found: Tensor, expected: Tensor, label: str) -> Sequence[str]:
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    return [] if error <= BOUND * largest else [f"{label}: off by {error} where the largest number is {largest}"]


@torch.inference_mode()
def denoised(ctx: RankContext) -> list[str]:
    assert ctx.comm is not None
    latents, conditions = noise_and_conditions(ctx.device)
    if ctx.rank > 0:
        latents = torch.zeros_like(latents)
    ctx.comm.cfg_broadcast_(latents, 0)
    model, together = Dit(DitConfig(), ctx.device), CfgGroup(ctx.comm)
    found = denoise(model, together, latents, conditions, SCALE, STEPS)
    with alone(ctx) as own:
        one = denoise(model, CfgGroup(own), latents, conditions, SCALE, STEPS)
        same = denoise(branch_by_branch(model), CfgGroup(own), latents, conditions, SCALE, STEPS)
    unguided = denoise(model, together, latents, conditions, 1.0, STEPS)
    assert (unguided - found).abs().max() > 0.01, "the scale matters"
    return [*far(found, one, "against one rank"), *difference(found, same, "against one rank, branch by branch")]


@torch.inference_mode()
def compiled(ctx: RankContext) -> list[str]:
    assert ctx.comm is not None
    latents, conditions = noise_and_conditions(ctx.device)
    model, together = Dit(DitConfig(), ctx.device), CfgGroup(ctx.comm)
    step = torch.compile(denoise_step, fullgraph=True)
    found = eager = latents
    for time in (1.0, 0.75):
        arguments = (conditions, SCALE, time, time - 0.25)
        found = step(model, together, found, *arguments)
        eager = denoise_step(model, together, eager, *arguments)
    return [*far(found, eager, "compiled")]


@torch.inference_mode()
def in_a_graph(ctx: RankContext) -> list[str]:
    """All of the denoising in one graph, replayed with other noise: the bits of the same calls one by one."""
    assert ctx.comm is not None
    latents, conditions = noise_and_conditions(ctx.device)
    model, together = Dit(DitConfig(), ctx.device), CfgGroup(ctx.comm)

    def denoised_once() -> Tensor:
        return denoise(model, together, latents, conditions, SCALE, STEPS)

    denoised_once()
    graph = torch.cuda.CUDAGraph()
    with ctx.comm.capture(), capturing(graph):
        captured = denoised_once()
    wrong = []
    for number in range(3):
        latents.mul_(-0.9)
        synchronize(ctx)
        graph.replay()
        found = captured.clone()
        wrong += difference(found, denoised_once(), f"replay {number}")
    return wrong


both_devices = pytest.mark.parametrize("ranks", [*ranks_on("cpu", (2,)), *ranks_on("cuda", (2,))])


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3)), *ranks_on("cuda", (2, 3))])
def test_branches_combine_to_the_same_bits_on_one_rank_and_on_many(ranks: Ranks) -> None:
    ranks.all_right(combined)


def test_bad_arguments() -> None:
    for texts in Ranks("cpu", 2).run(errors):
        assert texts == [
            "CfgGroup: got num_branches=1; expected at least 2",
            "CfgGroup: got a group of 2 ranks; expected 3, one a branch, or 1",
            "CfgGroup.split: got a batch of shape (3, 2); expected dim 0 to be a multiple of 2, the number of branches",
            "CfgGroup.split: got a batch of shape (); expected dim 0 to be a multiple of 2, the number of branches",
            "CfgGroup.combine: got 3 weights; expected 2, one a branch",
            "CfgGroup.combine: got one scale for 3 branches; expected a weight for each",
            "CfgGroup.combine: got torch.float64; expected one of torch.float32, torch.bfloat16, torch.float16",
        ]


@both_devices
def test_a_denoiser_with_a_branch_on_each_of_two_ranks_equals_one_rank_with_both(ranks: Ranks) -> None:
    ranks.all_right(denoised)


@pytest.mark.parametrize("ranks", ranks_on("cuda", (2,)))
def test_a_denoiser_in_a_cuda_graph(ranks: Ranks) -> None:
    ranks.all_right(in_a_graph)


@both_devices
def test_a_denoising_step_compiles_as_a_whole(ranks: Ranks) -> None:
    ranks.all_right(compiled, deadline=240)
