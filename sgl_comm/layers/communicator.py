"""When a decoder layer reduces, gathers, scatters and normalises."""

from __future__ import annotations

from torch import Tensor

from sgl_comm.communicator import Communicator
from sgl_comm.errors import SglCommError
from sgl_comm.layers import transitions
from sgl_comm.layers.groups import LayerGroups
from sgl_comm.layers.norm import Norm
from sgl_comm.layers.partial_sum import PartialSum
from sgl_comm.layers.scatter_mode import LayerScatterModes, ScatterMode
from sgl_comm.layers.transitions import Transition, TransitionTable


class LayerCommunicator:
    """The communication of one decoder layer::

        hidden, residual = comm.prepare_attn(hidden, residual)
        hidden = comm.attn_output(attention(hidden))  # not reduced
        hidden, residual = comm.prepare_mlp(hidden, residual)
        hidden = comm.mlp_output(mlp(hidden))  # not reduced
        hidden, residual = comm.postprocess_layer(hidden, residual)

    What each of the three does follows from the modes, and is settled when the communicator is made.

    Args:
        groups: the model's groups.
        modes: the layer's, by ``LayerScatterModes.init_new``.
        input_norm, post_attention_norm: the layer's normalisations, in front of attention and of the MLP.
        is_last_layer: whether no layer comes after it that could reduce instead of it.
        allow_mlp_allreduce_fusion: whether the next layer may reduce what this one's MLP gives.
        allow_reduce_scatter: whether an MLP on all tokens may be reduced by reduce-scatter.
        mlp_reduces: the MLP's down-projection reduces its output itself, and gives a tensor.

    Raises:
        SglCommError: modes without a transition between them, or an MLP that would be reduced twice.
    """

    def __init__(
        self,
        groups: LayerGroups,
        modes: LayerScatterModes,
        input_norm: Norm,
        post_attention_norm: Norm,
        *,
        is_last_layer: bool,
        allow_mlp_allreduce_fusion: bool = False,
        allow_reduce_scatter: bool = False,
        mlp_reduces: bool = False,
    ) -> None:
        for name, allowed in (
            ("allow_mlp_allreduce_fusion", allow_mlp_allreduce_fusion),
            ("allow_reduce_scatter", allow_reduce_scatter),
        ):
            if mlp_reduces and allowed:
                raise SglCommError(
                    f"LayerCommunicator: got mlp_reduces=True with {name}=True, which would reduce the MLP's output"
                    f" twice; expected a down-projection that does not reduce, or {name}=False"
                )
        self.groups, self.modes = groups, modes
        self.input_norm, self.post_attention_norm = input_norm, post_attention_norm
        self.mlp_gives_tensor = mlp_reduces or modes.mlp_mode is ScatterMode.SCATTERED
        """Whether the MLP's output needs no sum: weights that are not divided, or ``mlp_reduces``."""
        self._prepare_attn = self._pick("prepare_attn", transitions.PREPARE_ATTN, "layer_input_mode", "attn_mode")
        self._prepare_mlp = self._pick(
            "prepare_mlp", transitions.PREPARE_MLP, "attn_mode", "layer_input_mode", "mlp_mode", "middle_residual_mode"
        )
        self._postprocess = self._pick(
            "postprocess_layer", transitions.POSTPROCESS, "mlp_mode", "middle_residual_mode", "layer_output_mode"
        )
        stays = self._postprocess is transitions.reduce and self.mlp_group.world_size > 1
        self._fuses = allow_mlp_allreduce_fusion and stays and not self.mlp_gives_tensor and not is_last_layer
        self._reduce_scatters = allow_reduce_scatter and self._postprocess is transitions.reduce_and_take_own
        if self._fuses:
            self._postprocess = transitions.leave_to_next_layer
        elif self._reduce_scatters:
            self._postprocess = transitions.reduce_scatter_own

    def _pick(self, name: str, table: TransitionTable, *fields: str) -> Transition:
        """The transition of ``name`` between the modes in these fields of ``LayerScatterModes``."""
        modes = [getattr(self.modes, field) for field in fields]
        transition = table.get(tuple(self._merged(mode) for mode in modes))
        if transition is None:
            named = ", ".join(f"{field}={mode.name}" for field, mode in zip(fields, modes, strict=True))
            raise SglCommError(f"LayerCommunicator: got {named}; expected modes that {name} has a function for")
        return transition

    def _merged(self, mode: ScatterMode) -> ScatterMode:
        """One mode for all by which this rank holds the same tokens, as the tables have it."""
        one_piece = mode is ScatterMode.SCATTERED and self.groups.attn_tp.world_size == 1
        one_group = mode is ScatterMode.FULL and self.groups.attn_dp.world_size == 1
        return ScatterMode.TP_ATTN_FULL if one_piece or one_group else mode

    @property
    def mlp_group(self) -> Communicator:
        """The ranks that the MLP's weights are divided over: this rank alone where they are not divided."""
        return {
            ScatterMode.SCATTERED: self.groups.alone,
            ScatterMode.TP_ATTN_FULL: self.groups.attn_tp,
            ScatterMode.FULL: self.groups.tp,
        }[self.modes.mlp_mode]

    def attn_output(self, tensor: Tensor) -> PartialSum:
        """Marks the unreduced output of attention's output projection as a sum over the attention-TP group."""
        return PartialSum(tensor, self.groups.attn_tp.group_name)

    def mlp_output(self, tensor: Tensor) -> PartialSum | Tensor:
        """Marks the unreduced output of a down-projection, an MLP's or a shared expert's, as a sum over ``mlp_group``.

        Two such sums may be added. A tensor comes back as it is where ``mlp_gives_tensor``.
        """
        return tensor if self.mlp_gives_tensor else PartialSum(tensor, self.mlp_group.group_name)

    def should_fuse_mlp_allreduce_with_next_layer(self) -> bool:
        """Whether ``postprocess_layer`` leaves the sum to the next layer's ``prepare_attn``, which fuses it with the
        normalisation: the layer gives an unreduced sum over the attention-TP group, and is not the last."""
        return self._fuses

    def should_use_reduce_scatter(self) -> bool:
        """Whether ``postprocess_layer`` reduce-scatters: all ranks have all tokens, and go on with their groups'."""
        return self._reduce_scatters

    def prepare_attn(self, hidden_states: Tensor | PartialSum, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """From what the layer gets to the input of attention.

        Args:
            hidden_states: [tokens, hidden] in the layer's input mode; an unreduced sum only where the layer before
                left it so.
            residual: of the same shape, in the same mode; None on the first layer.

        Returns:
            The normalised input of attention, and the residual (with ``hidden_states`` added) in the input mode.

        Raises:
            SglCommError: a sum of another group or used up, or a number of rows that does not fit.
        """
        return self._prepare_attn(self, hidden_states, residual)

    def prepare_mlp(self, hidden_states: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
        """From attention's output, not reduced, to the input of the MLP.

        Args:
            hidden_states: what ``attn_output`` gave.
            residual: what ``prepare_attn`` gave.

        Returns:
            The normalised input of the MLP in its mode, and the new residual in ``middle_residual_mode``.

        Raises:
            SglCommError: a tensor, a sum of another group or used up, or a number of rows that does not fit.
        """
        return self._prepare_mlp(self, hidden_states, residual)

    def postprocess_layer(
        self, hidden_states: PartialSum | Tensor, residual: Tensor
    ) -> tuple[Tensor | PartialSum, Tensor | None]:
        """From the MLP's output to what the layer gives, for the next ``prepare_attn`` or ``final_norm``.

        Args:
            hidden_states: what ``mlp_output`` gave, or a sum of such.
            residual: what ``prepare_mlp`` gave.

        Returns:
            Hidden states and residual in the layer's output mode. The residual is None where it is in the hidden
            states already: that is so on a last layer that gathers scattered tokens.

        Raises:
            SglCommError: a tensor where a sum was expected or the other way round, a sum of another group or used up,
                or a number of rows that does not fit.
        """
        return self._postprocess(self, hidden_states, residual)


def final_norm(
    groups: LayerGroups, norm: Norm, hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What follows the last layer: adds the residual, if there is one, and normalises; no collective."""
    return norm(hidden_states, residual, groups.alone.group_name)
