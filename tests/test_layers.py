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
