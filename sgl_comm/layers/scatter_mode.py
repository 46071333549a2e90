"""Which tokens a rank holds at each step of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sgl_comm.layers.parallel_config import ParallelConfig


class ScatterMode(Enum):
    """Which tokens a rank holds. With 4 ranks in 2 attention-TP groups, of which one has tokens a b, the other c d:

    | rank | SCATTERED | TP_ATTN_FULL | FULL |
    |---|---|---|---|
    | 0 | a | a b | a b c d |
    | 1 | b | a b | a b c d |
    | 2 | c | c d | a b c d |
    | 3 | d | c d | a b c d |
    """

    SCATTERED = auto()
    """A part of the tokens of its attention-TP group."""
    TP_ATTN_FULL = auto()
    """All tokens of its attention-TP group."""
    FULL = auto()
    """All tokens of the TP group, one attention-TP group after the other."""


MODEL_INPUT_OUTPUT = ScatterMode.TP_ATTN_FULL
"""What the first layer gets and the last one gives."""


@dataclass(frozen=True)
class LayerScatterModes:
    """The mode of the tokens at each step of a decoder layer."""

    layer_input_mode: ScatterMode
    """What the layer gets, hidden states and residual."""
    attn_mode: ScatterMode
    """Where attention computes."""
    mlp_mode: ScatterMode
    """Where the MLP computes."""
    middle_residual_mode: ScatterMode
    """The residual while the MLP computes."""
    layer_output_mode: ScatterMode
    """What the layer gives, hidden states and residual: the next one's input."""

    @classmethod
    def init_new(
        cls,
        *,
        config: ParallelConfig,
        is_layer_sparse: bool,
        is_previous_layer_sparse: bool,
        is_first_layer: bool,
        is_last_layer: bool,
    ) -> LayerScatterModes:
        """The modes of one layer.

        Args:
            config: the layout of the model.
            is_layer_sparse: whether its MLP is a mixture of experts (MoE), not a dense one.
            is_previous_layer_sparse: whether the MLP of the layer before is one; without effect on the first layer.
            is_first_layer: whether it gets the model's input.
            is_last_layer: whether it gives the model's output.
        """
        mlp_mode = _mlp_mode(config, is_layer_sparse)
        if is_first_layer:
            layer_input_mode = MODEL_INPUT_OUTPUT
        else:
            layer_input_mode = _residual_mode(_mlp_mode(config, is_previous_layer_sparse))
        return cls(
            layer_input_mode=layer_input_mode,
            attn_mode=ScatterMode.TP_ATTN_FULL,
            mlp_mode=mlp_mode,
            middle_residual_mode=_residual_mode(mlp_mode),
            layer_output_mode=MODEL_INPUT_OUTPUT if is_last_layer else _residual_mode(mlp_mode),
        )


def _mlp_mode(config: ParallelConfig, is_sparse: bool) -> ScatterMode:
    if is_sparse:
        return ScatterMode.FULL if config.moe_a2a_backend is None else ScatterMode.SCATTERED
    if config.dense_stays_in_attn_tp:
        return ScatterMode.TP_ATTN_FULL
    return ScatterMode.SCATTERED if config.moe_dense_tp_size == 1 else ScatterMode.FULL


def _residual_mode(mlp_mode: ScatterMode) -> ScatterMode:
    """The residual goes along with scattered tokens; it is never gathered from other attention-TP groups."""
    return ScatterMode.SCATTERED if mlp_mode is ScatterMode.SCATTERED else ScatterMode.TP_ATTN_FULL
