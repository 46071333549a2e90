"""Decoders divided over real ranks by ``LayerCommunicator`` equal the undivided one, in every layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import tiny_decoder
import torch
from cases import Ranks, generator

from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.testing import RankContext, bits_equal

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

OPTIONS = [
    *(
        {"allow_mlp_allreduce_fusion": fuse, "allow_reduce_scatter": scatter}
        for fuse in (False, True)
        for scatter in (False, True)
    ),
    {"mlp_reduces": True},
]
"""Who reduces an MLP's output, and how: the same bits whoever does."""

TOKENS = {
    1: [(5,), (8,), (1,), (0,)],
    2: [(5, 2), (0, 3), (4, 4), (0, 0)],
    4: [(3, 0, 1, 2), (2, 2, 2, 2), (0, 0, 0, 1)],
}
"""How many tokens each attention-TP group has; the first of a list for every stack, the others for one."""


def wrong_outputs(ctx: RankContext, config: ParallelConfig, options: Sequence[dict[str, bool]]) -> list[str]:
    """What differs from the undivided decoder, of all stacks of a layout."""
    wrong = []
    with LayerGroups(config, ctx.group, ctx.device) as groups:
        for stack in STACKS:
            decoder = tiny_decoder.make(stack)
            counts = TOKENS[config.attn_dp_size]
            for tokens in counts if stack == "MDM" else counts[:1]:
                inputs = torch.randn(sum(tokens), tiny_decoder.HIDDEN, generator=generator(stack, tokens)).split(tokens)
                x = inputs[groups.attn_dp_rank]
                expected = tiny_decoder.whole(decoder, x)
                groups.set_num_tokens(tokens)
                outputs = []
                for option in options:
                    parts = tiny_decoder.parts(decoder, config, groups, ctx.group, **option)
                    outputs.append(tiny_decoder.run(decoder, parts, x))
                    bound = 1e-5 * expected.abs().max() if x.numel() else 0
                    off = (outputs[-1] - expected).abs()
                    if off.shape != expected.shape or not (off <= bound).all():
                        wrong.append(f"{stack} with {tokens} tokens, {option}: off by {off}, at most {bound}")
                    elif not bits_equal(outputs[-1], outputs[0]):
                        wrong.append(f"{stack} with {tokens} tokens, {option}: other bits than {options[0]}")
    return wrong


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_layout_equals_the_undivided_decoder(config: ParallelConfig) -> None:
    Ranks("cpu", config.tp_size).all_right(wrong_outputs, config, OPTIONS)


def other_bits(ctx: RankContext, config: ParallelConfig, options: Sequence[dict[str, bool]]) -> list[str]:
    """What differs in bfloat16 between the ways to reduce an MLP's output."""
    wrong = []
    with LayerGroups(config, ctx.group, ctx.device) as groups:
        tokens = TOKENS[config.attn_dp_size][0]
        groups.set_num_tokens(tokens)
        x = torch.randn(tokens[groups.attn_dp_rank], tiny_decoder.HIDDEN, generator=generator(tokens)).bfloat16()
        for stack in STACKS:
            decoder = tiny_decoder.make(stack, torch.bfloat16)
            outputs = [
                tiny_decoder.run(decoder, tiny_decoder.parts(decoder, config, groups, ctx.group, **option), x)
                for option in options
            ]
            wrong += [stack for output in outputs if not bits_equal(output, outputs[0])]
    return wrong


@pytest.mark.parametrize("layout", [(2, 1, False), (4, 2, True), (4, 4, True)], ids=str)
def test_bits_do_not_depend_on_who_reduces(layout: tuple[int, int, bool]) -> None:
    Ranks("cpu", layout[0]).all_right(other_bits, ParallelConfig(*layout), OPTIONS[:-1])


def wrong_compiled(ctx: RankContext, config: ParallelConfig, option: dict[str, bool], backend: str) -> list[str]:
    with LayerGroups(config, ctx.group, ctx.device) as groups, torch.no_grad():
        decoder = tiny_decoder.make("DMM")
        groups.set_num_tokens([3] * config.attn_dp_size)
        parts = tiny_decoder.parts(decoder, config, groups, ctx.group, **option)
        x = torch.randn(3, tiny_decoder.HIDDEN, generator=generator("compiled"))
        expected = tiny_decoder.run(decoder, parts, x)
        torch._dynamo.reset()
        found = torch.compile(lambda x: tiny_decoder.run(decoder, parts, x), backend=backend, fullgraph=True)(x)
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
