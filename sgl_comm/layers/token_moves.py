"""How tokens move between the scatter modes. Padding goes into a collective and never comes out of it.

Groups may have different numbers of tokens, also none, while a collective wants the same number of rows from each rank.
So rows are padded with zeros before it, and what came of these is cut off after it: no layer sees a padded row.
T tokens scattered over the A ranks of an attention-TP group are in pieces of ceil(T / A) rows; the last may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgl_comm import ops
from sgl_comm.errors import SglCommError
from sgl_comm.layers.groups import LayerGroups


def own_piece(groups: LayerGroups, rows: Tensor, where: str) -> Tensor:
    """TP_ATTN_FULL to SCATTERED, of what all ranks of the group have: a view of this rank's piece."""
    expect_rows(rows, groups.own_num_tokens, where)
    start, end = _piece(groups)
    return rows[start:end]


def sum_own_piece(groups: LayerGroups, rows: Tensor, where: str) -> Tensor:
    """TP_ATTN_FULL to SCATTERED, of addends over the attention-TP group: this rank's piece of the sum."""
    expect_rows(rows, groups.own_num_tokens, where)
    width = groups.attn_tp.world_size
    start, end = _piece(groups)
    return ops.reduce_scatter(
        _padded(rows, width * _per_rank(groups.own_num_tokens, width)), groups.attn_tp.group_name
    )[: end - start]


def gather_pieces(groups: LayerGroups, piece: Tensor, where: str) -> Tensor:
    """SCATTERED to TP_ATTN_FULL: one ``all_gather`` over the attention-TP group."""
    start, end = _piece(groups)
    expect_rows(piece, end - start, where)
    each = _per_rank(groups.own_num_tokens, groups.attn_tp.world_size)
    return ops.all_gather(_padded(piece, each), groups.attn_tp.group_name)[: groups.own_num_tokens]


def gather_groups(groups: LayerGroups, rows: Tensor) -> Tensor:
    """TP_ATTN_FULL to FULL: one ``all_gather`` over the ranks of the same number in each attention-TP group."""
    counts, most = groups.num_tokens, max(groups.num_tokens)
    gathered = ops.all_gather(_padded(rows, most), groups.attn_dp.group_name)
    if min(counts) == most:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])


def own_group(groups: LayerGroups, rows: Tensor) -> Tensor:
    """FULL to TP_ATTN_FULL, of what all ranks have: a view of the tokens of this rank's group."""
    counts, me = groups.num_tokens, groups.attn_dp_rank
    return rows[sum(counts[:me]) :][: counts[me]]


def sum_own_group(groups: LayerGroups, rows: Tensor, where: str) -> Tensor:
    """FULL to TP_ATTN_FULL, of addends over all ranks: ``reduce_scatter``, and ``all_gather`` in the group if it has
    several ranks. The bits are those of an all-reduce."""
    counts, width = groups.num_tokens, groups.attn_tp.world_size
    expect_rows(rows, sum(counts), where)
    each = _per_rank(max(counts), width)
    if min(counts) < width * each:
        rows = torch.cat([_padded(part, width * each) for part in rows.split(counts)])
    piece = ops.reduce_scatter(rows, groups.tp.group_name)
    if width > 1:
        piece = ops.all_gather(piece, groups.attn_tp.group_name)
    return piece[: groups.own_num_tokens]


def _per_rank(tokens: int, ranks: int) -> int:
    return -(-tokens // ranks)


def _piece(groups: LayerGroups) -> tuple[int, int]:
    """The first row of this rank's piece of its group's tokens, and the row after the last one."""
    tokens = groups.own_num_tokens
    each = _per_rank(tokens, groups.attn_tp.world_size)
    return min(groups.attn_tp_rank * each, tokens), min((groups.attn_tp_rank + 1) * each, tokens)


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = count - rows.size(0)
    return pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def expect_rows(rows: Tensor, count: int, where: str) -> None:
    """Refuses another number of rows; called before anything is sent."""
    if rows.size(0) != count:
        raise SglCommError(
            f"{where}: got {rows.size(0)} rows; expected {count}, by the numbers of tokens that were set"
        )
