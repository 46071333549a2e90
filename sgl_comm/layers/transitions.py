"""What ``prepare_attn``, ``prepare_mlp`` and ``postprocess_layer`` do: transitions from one scatter mode to another.

In the three tables modes by which a rank holds the same tokens are one: SCATTERED is TP_ATTN_FULL where an attention-TP
group has one rank, and FULL is TP_ATTN_FULL where there is one such group. What is not in a table cannot be done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sgl_comm import ops
from sgl_comm.communicator import Communicator
from sgl_comm.errors import SglCommError
from sgl_comm.layers import token_moves
from sgl_comm.layers.groups import LayerGroups
from sgl_comm.layers.norm import Norm
from sgl_comm.layers.partial_sum import PartialSum, take
from sgl_comm.layers.scatter_mode import ScatterMode


class Layer(Protocol):
    """What a transition needs to know of its layer; ``LayerCommunicator`` has it."""

    groups: LayerGroups
    input_norm: Norm
    post_attention_norm: Norm
    mlp_gives_tensor: bool

    @property
    def mlp_group(self) -> Communicator:
        """The ranks that the MLP's weights are divided over."""


Transition = Callable[..., Any]
"""``transition(layer, hidden_states, residual)`` gives the new hidden states and the new residual."""

TransitionTable = dict[tuple[ScatterMode, ...], Transition]
"""Modes -> the transition between them."""

S, T, F = ScatterMode.SCATTERED, ScatterMode.TP_ATTN_FULL, ScatterMode.FULL


# --- prepare_attn, by the layer's input mode and the mode of attention


def norm_input(layer: Layer, hidden: Tensor | PartialSum, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalises the layer's input, after the sum of what the layer before has left unreduced."""
    if not isinstance(hidden, PartialSum):
        return layer.input_norm(hidden, residual, layer.groups.alone.group_name)
    if residual is None:
        raise SglCommError("prepare_attn: got a PartialSum without a residual; expected a tensor on the first layer")
    name = layer.groups.attn_tp.group_name
    return layer.input_norm(take(hidden, name, "prepare_attn"), residual, name)


def norm_input_and_gather(layer: Layer, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each rank normalises its piece; then the attention-TP group gathers the pieces."""
    hidden = _tensor(hidden, "prepare_attn")
    normed, residual = layer.input_norm(hidden, residual, layer.groups.alone.group_name)
    return token_moves.gather_pieces(layer.groups, normed, "prepare_attn"), residual


PREPARE_ATTN: TransitionTable = {(T, T): norm_input, (S, T): norm_input_and_gather}


# --- prepare_mlp, by the modes of attention, of the residual before, of the MLP, and of the residual after


def reduce_and_norm(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The fused op: sums over the attention-TP group, adds the residual, normalises."""
    name = layer.groups.attn_tp.group_name
    return layer.post_attention_norm(_addend(hidden, name, "prepare_mlp"), residual, name)


def gather_residual_reduce_and_norm(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``reduce_and_norm`` where the residual is scattered: gathers it first."""
    return reduce_and_norm(layer, hidden, token_moves.gather_pieces(layer.groups, residual, "prepare_mlp"))


def reduce_norm_and_gather(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``reduce_and_norm``; then gathers the tokens of the other attention-TP groups."""
    token_moves.expect_rows(residual, layer.groups.own_num_tokens, "prepare_mlp")
    normed, residual = reduce_and_norm(layer, hidden, residual)
    return token_moves.gather_groups(layer.groups, normed), residual


def gather_residual_reduce_norm_and_gather(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``reduce_norm_and_gather`` where the residual is scattered: gathers it first."""
    normed, residual = gather_residual_reduce_and_norm(layer, hidden, residual)
    return token_moves.gather_groups(layer.groups, normed), residual


def reduce_scatter_and_norm(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Each rank gets the sum of its piece and normalises that; the residual is scattered already."""
    addend = _addend(hidden, layer.groups.attn_tp.group_name, "prepare_mlp")
    piece = token_moves.sum_own_piece(layer.groups, addend, "prepare_mlp")
    return layer.post_attention_norm(piece, residual, layer.groups.alone.group_name)


def scatter_residual_reduce_scatter_and_norm(
    layer: Layer, hidden: PartialSum, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """``reduce_scatter_and_norm`` where the residual is not scattered: takes this rank's piece of it first."""
    return reduce_scatter_and_norm(layer, hidden, token_moves.own_piece(layer.groups, residual, "prepare_mlp"))


PREPARE_MLP: TransitionTable = {
    (T, T, T, T): reduce_and_norm,
    (T, S, T, T): gather_residual_reduce_and_norm,
    (T, T, F, T): reduce_norm_and_gather,
    (T, S, F, T): gather_residual_reduce_norm_and_gather,
    (T, S, S, S): reduce_scatter_and_norm,
    (T, T, S, S): scatter_residual_reduce_scatter_and_norm,
}


# --- postprocess_layer, by the modes of the MLP, of the residual and of the layer's output


def reduce(layer: Layer, hidden: PartialSum | Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the sum of the MLP's addends, if there is one to make; the tokens stay where they are."""
    return _reduced(layer, hidden), residual


def reduce_and_take_own(layer: Layer, hidden: PartialSum | Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the sum of all tokens, and goes on with those of this rank's attention-TP group."""
    expected = sum(layer.groups.num_tokens)
    return token_moves.own_group(layer.groups, _reduced(layer, hidden, expected)), residual


def add_and_gather(layer: Layer, hidden: Tensor, residual: Tensor) -> tuple[Tensor, None]:
    """Adds scattered hidden states and residual, and gathers the sum, which the last layer gives unscattered."""
    total = _tensor(hidden, "postprocess_layer") + residual
    return token_moves.gather_pieces(layer.groups, total, "postprocess_layer"), None


POSTPROCESS: TransitionTable = {
    (T, T, T): reduce,
    (F, T, T): reduce_and_take_own,
    (S, S, S): reduce,
    (S, S, T): add_and_gather,
}


def leave_to_next_layer(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[PartialSum, Tensor]:
    """Instead of ``reduce``: the next layer's ``prepare_attn`` reduces."""
    if not isinstance(hidden, PartialSum):
        raise _expected_sum("postprocess_layer")
    return hidden, residual


def reduce_scatter_own(layer: Layer, hidden: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Instead of ``reduce_and_take_own``: each rank sums only the tokens that its attention-TP group goes on with."""
    addend = _addend(hidden, layer.groups.tp.group_name, "postprocess_layer")
    return token_moves.sum_own_group(layer.groups, addend, "postprocess_layer"), residual


# --- tensors and sums


def _reduced(layer: Layer, hidden: PartialSum | Tensor, expected: int | None = None) -> Tensor:
    """What the MLP gave, reduced; it must have as many rows as ``expected``, if that is given."""
    group = layer.mlp_group
    if layer.mlp_gives_tensor:
        addend = _tensor(hidden, "postprocess_layer")
    else:
        addend = _addend(hidden, group.group_name, "postprocess_layer")
    if expected is not None:
        token_moves.expect_rows(addend, expected, "postprocess_layer")
    if layer.mlp_gives_tensor or group.world_size == 1:
        return addend
    return ops.all_reduce(addend, group.group_name)


def _addend(hidden: PartialSum | Tensor, group_name: str, where: str) -> Tensor:
    if not isinstance(hidden, PartialSum):
        raise _expected_sum(where)
    return take(hidden, group_name, where)


def _tensor(hidden: PartialSum | Tensor, where: str) -> Tensor:
    if isinstance(hidden, PartialSum):
        raise SglCommError(
            f"{where}: got {hidden}; expected a tensor, since nothing is left to be reduced in this mode"
        )
    return hidden


def _expected_sum(where: str) -> SglCommError:
    return SglCommError(
        f"{where}: got a tensor; expected a PartialSum (attn_output and mlp_output make one of a projection's output,"
        " which must not be reduced already)"
    )
