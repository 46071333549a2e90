"""A layer's normalisation, alone or fused with the sum over an attention-TP group before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_comm import ops


@dataclass(frozen=True, eq=False)
class Norm:
    """What ``tp_attn_all_reduce_and_layernorm`` needs to know of a normalisation of rows."""

    weight: Tensor
    """Shape [hidden], of the input's dtype or float32."""
    bias: Tensor | None = None
    """Of the weight's shape; for kind "layer" only."""
    eps: float = 1e-6
    kind: str = "rms"
    """"rms" or "layer"."""
    weight_offset: float = 0.0
    """Is added to the weight (1.0 for Gemma's)."""

    def __call__(self, hidden_states: Tensor, residual: Tensor | None, group_name: str) -> tuple[Tensor, Tensor]:
        """Sums over a group, adds the residual, normalises. In a group of this rank alone there is nothing to sum.

        Args:
            hidden_states: [tokens, hidden], this rank's addend.
            residual: of the same shape and dtype, alike on all ranks of the group; None for none.
            group_name: the group to sum over.

        Returns:
            The normalised rows and the new residual, both new tensors of that shape and dtype.

        Raises:
            SglCommError: what the op refuses.
        """
        if residual is None:
            residual = torch.full_like(hidden_states, -0.0)  # what changes no number, not even the sign of a zero
        return ops.tp_attn_all_reduce_and_layernorm(
            hidden_states,
            residual,
            self.weight,
            self.bias,
            self.eps,
            self.kind,
            self.weight_offset,
            group_name=group_name,
        )
