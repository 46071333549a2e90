"""Tokens on their way between the modes: each row where it belongs, whatever the groups' numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.errors import error_text
from helpers.ranks import Ranks
from sgl_comm.layers import LayerGroups, ParallelConfig, token_moves
from sgl_comm.testing import RankContext, run_ranks

CONFIG = ParallelConfig(6, 2, True)

PIECES = {
    # tokens of the two groups -> the rows (of all tokens) that each of the six ranks has scattered
    (7, 2): ([0, 1, 2], [3, 4, 5], [6], [7], [8], []),
    (3, 6): ([0], [1], [2], [3, 4], [5, 6], [7, 8]),
    (0, 4): ([], [], [], [0, 1], [2, 3], []),
    (1, 1): ([0], [], [], [1], [], []),
    (0, 0): ([], [], [], [], [], []),
}


def wrong_moves(ctx: RankContext, tokens: tuple[int, int], pieces: tuple[list[int], ...]) -> list[str]:
    """Row i of all tokens is i + 1; an addend is that times a power of two of the rank."""
    with LayerGroups(CONFIG, ctx.group, ctx.device) as groups:
        groups.set_num_tokens(tokens)
        every = torch.arange(1.0, sum(tokens) + 1)[:, None].expand(-1, 3)
        own = every.split(tokens)[groups.attn_dp_rank]
        mine = every[pieces[ctx.rank]]
        of_group = own * 2**groups.attn_tp_rank  # the three ranks' addends are 7 times the row together
        of_all = every * 2**ctx.rank
        found: dict[str, tuple[Tensor, Tensor]] = {
            "own_piece": (token_moves.own_piece(groups, own, "test"), mine),
            "sum_own_piece": (token_moves.sum_own_piece(groups, of_group, "test"), 7 * mine),
            "gather_pieces": (token_moves.gather_pieces(groups, mine, "test"), own),
            "gather_groups": (token_moves.gather_groups(groups, own), every),
            "own_group": (token_moves.own_group(groups, every), own),
            "sum_own_group": (token_moves.sum_own_group(groups, of_all, "test"), 63 * own),
        }
        wrong = [f"{name}: {got} is not {want}" for name, (got, want) in found.items() if not torch.equal(got, want)]
        longer = torch.ones(sum(tokens) + 1, 3)
        for name in ("own_piece", "sum_own_piece", "gather_pieces", "sum_own_group"):
            text = error_text(lambda name=name: getattr(token_moves, name)(groups, longer, "test"))
            if not text.startswith(f"test: got {sum(tokens) + 1} rows; expected "):
                wrong.append(f"{name} of too many rows: {text!r}")
    return wrong


@pytest.mark.parametrize("tokens", PIECES, ids=str)
def test_every_row_goes_where_it_belongs(tokens: tuple[int, int]) -> None:
    Ranks("cpu", CONFIG.tp_size).all_right(wrong_moves, tokens, PIECES[tokens])


def exchanged(ctx: RankContext) -> tuple[int, ...]:
    with LayerGroups(CONFIG, ctx.group, ctx.device) as groups:
        return (*groups.exchange_num_tokens(10 * groups.attn_dp_rank + 1), groups.own_num_tokens)


def test_numbers_of_tokens_are_exchanged() -> None:
    assert run_ranks(exchanged, CONFIG.tp_size) == [(1, 11, 1)] * 3 + [(1, 11, 11)] * 3
