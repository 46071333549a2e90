"""Decoders divided over real ranks by ``LayerCommunicator`` equal the undivided one, in every layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import Ranks
from helpers.values import generator
from sgl_comm import ops
from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.models import ModelConfig, Step3p5, Unsharded
from sgl_comm.testing import RankContext, bits_equal

Options = Sequence[dict[str, Any]]

A2A = "all_to_all_single"

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 2, True), (4, 1, False), (4, 2, True), (4, 4, True)]
"""tp_size, dp_size, enable_dp_attention: attention TP 1, 2, 1, 4, 2, 1."""

CONFIGS = [
    ParallelConfig(*layout, dense, backend)
    for layout in LAYOUTS
    for dense in dict.fromkeys((None, 1, layout[0]))
    for backend in (None, A2A)
]

STACKS = ["D", "M", *map("".join, itertools.product("DM", repeat=3))]
"""Layers, dense or MoE: each kind with each before and behind it, as the first, the last, and both."""

OPTIONS: Options = [
    *(
        {"allow_mlp_allreduce_fusion": fuse, "allow_reduce_scatter": scatter}
        for fuse in (False, True)
        for scatter in (False, True)
    ),
    {"all_reduce": ops.all_reduce},
]
"""Who reduces an MLP's output, and how, and at last with no fused op at all: the same bits whoever does."""

TOKENS = {
    1: [(5,), (8,), (1,), (0,)],
    2: [(5, 2), (0, 3), (4, 4), (0, 0)],
    4: [(3, 0, 1, 2), (2, 2, 2, 2), (0, 0, 0, 1)],
}
"""How many tokens each attention-TP group has; the first of a list for every stack, the others for one."""


def prompt_of(groups: LayerGroups, tokens: Sequence[int], *seed: object) -> Tensor:
    """One sequence for this rank's attention-TP group; says how many tokens there are."""
    groups.set_num_tokens(tokens)
    ids = torch.randint(ModelConfig.vocab_size, (1, sum(tokens)), generator=generator(*seed, tokens))
    return ids.split(tokens, 1)[groups.attn_dp_rank]


def outputs(ctx: RankContext, config: ModelConfig, groups: LayerGroups, ids: Tensor, options: Options) -> list[Tensor]:
    """Logits of a prompt, for each way to reduce."""
    found, first = [], None
    for option in options:
        model = Step3p5(config, groups, ctx.group, **{**OPTIONS[0], **option}, weights_of=first)
        first = first or model
        found.append(model(ids, model.make_cache(1, ids.size(1))))
    return found


def wrong_outputs(ctx: RankContext, config: ParallelConfig, options: Options) -> list[str]:
    """What differs from the undivided decoder, of all stacks of a layout."""
    wrong = []
    with LayerGroups(config, ctx.group, ctx.device) as groups:
        for stack in STACKS:
            shape = ModelConfig(stack)
            whole = Unsharded(shape)
            counts = TOKENS[config.attn_dp_size]
            for tokens in counts if stack == "MDM" else counts[:1]:
                ids = prompt_of(groups, tokens, stack)
                expected = whole(ids, whole.make_cache(1, ids.size(1)))
                bound = 1e-5 * expected.abs().max() if ids.numel() else 0
                found = outputs(ctx, shape, groups, ids, options)
                for option, output in zip(options, found, strict=True):
                    off = (output - expected).abs()
                    if off.shape != expected.shape or not (off <= bound).all():
                        wrong.append(f"{stack} with {tokens} tokens, {option}: off by {off}, at most {bound}")
                    elif not bits_equal(output, found[0]):
                        wrong.append(f"{stack} with {tokens} tokens, {option}: other bits than {options[0]}")
    return wrong


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_layout_equals_the_undivided_decoder(config: ParallelConfig) -> None:
    Ranks("cpu", config.tp_size).all_right(wrong_outputs, config, OPTIONS)


def other_bits(ctx: RankContext, config: ParallelConfig, options: Options) -> list[str]:
    """What differs in bfloat16 between the ways to reduce an MLP's output."""
    wrong = []
    with LayerGroups(config, ctx.group, ctx.device) as groups:
        for stack in STACKS:
            ids = prompt_of(groups, TOKENS[config.attn_dp_size][0], stack)
            first, *others = outputs(ctx, ModelConfig(stack, dtype=torch.bfloat16), groups, ids, options)
            wrong += [stack for output in others if not bits_equal(output, first)]
    return wrong


@pytest.mark.parametrize("layout", [(2, 1, False), (4, 2, True), (4, 4, True)], ids=str)
def test_bits_do_not_depend_on_who_reduces(layout: tuple[int, int, bool]) -> None:
    Ranks("cpu", layout[0]).all_right(other_bits, ParallelConfig(*layout), OPTIONS)


def wrong_compiled(ctx: RankContext, config: ParallelConfig, option: dict[str, bool], backend: str) -> list[str]:
    with LayerGroups(config, ctx.group, ctx.device) as groups, torch.no_grad():
        model = Step3p5(ModelConfig("DMM"), groups, **option)
        ids = prompt_of(groups, [3] * config.attn_dp_size, "compiled")
        expected = model(ids, model.make_cache(1, 3))
        torch._dynamo.reset()
        found = torch.compile(model, backend=backend, fullgraph=True)(ids, model.make_cache(1, 3))
    bound = 0.0 if backend == "aot_eager" else 1e-5 * expected.abs().max()
    return [] if (found - expected).abs().max() <= bound else [f"off by {(found - expected).abs().max()}"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", [(2, 1, False), (2, 2, True), (2, 1, False, 1)], ids=str)
def test_a_compiled_decoder_gives_the_same(layout: tuple[int, int, bool], backend: str) -> None:
    """All layers in one graph: unreduced sums live between its ops only."""
    Ranks("cpu", 2).all_right(wrong_compiled, ParallelConfig(*layout), OPTIONS[3], backend, deadline=300)


def capture_on_cpu(ctx: RankContext) -> None:
    with LayerGroups(ParallelConfig(2, 2, True), ctx.group) as groups, groups.capture():
        assert groups.tp.all_reduce(torch.ones(2)).tolist() == [2, 2]


def test_capture_of_all_groups() -> None:
    Ranks("cpu", 2).run(capture_on_cpu)
