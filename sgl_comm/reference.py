"""What the ops must give, to the bit: plain PyTorch, one process, no communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce(inputs: Sequence[Tensor]) -> Tensor:
    """The sum over ranks by the package's one rule of numerics.

    Args:
        inputs: every rank's tensor, in rank order; one shape, one of float32, bfloat16, float16; any strides.

    Returns:
        A row-major tensor of the inputs' shape and dtype: added in fp32 in rank order, starting from rank 0's value,
        and rounded once, to nearest even.
    """
    total = inputs[0].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for tensor in inputs[1:]:
        total += tensor.to(torch.float32)
    return total.to(inputs[0].dtype)


def reduce_scatter(inputs: Sequence[Tensor], rank: int) -> Tensor:
    """What ``rank`` gets of the sum over ranks, divided along dim 0 into a share a rank.

    Args:
        inputs: as for ``all_reduce``; dim 0 can be divided by their number.
        rank: whose share.

    Returns:
        A row-major tensor of its own: the ``rank``-th share of ``all_reduce``'s rows.
    """
    rows = inputs[0].size(0) // len(inputs)
    return all_reduce(inputs)[rank * rows : (rank + 1) * rows].clone()


def all_gather(inputs: Sequence[Tensor]) -> Tensor:
    """Every rank's tensor along dim 0, in rank order, bit for bit.

    Args:
        inputs: every rank's tensor; one shape of at least one dimension, one dtype, any dtype and strides.

    Returns:
        A row-major tensor of the inputs' dtype.
    """
    first = inputs[0]
    out = torch.empty((len(inputs), *first.shape), dtype=first.dtype, device=first.device)
    for rows, tensor in zip(out, inputs, strict=True):
        rows.copy_(tensor)
    return out.flatten(0, 1)


def cfg_broadcast(inputs: Sequence[Tensor], src: int) -> Tensor:
    """Rank ``src``'s tensor, bit for bit.

    Args:
        inputs: every rank's tensor; one shape, one dtype, any dtype and strides.
        src: whose.

    Returns:
        A new row-major tensor.
    """
    return inputs[src].clone(memory_format=torch.contiguous_format)


def row_sum(values: Tensor) -> Tensor:
    """The sums along the last dimension by the package's one order, which depends on its size alone (csrc/norm.h).

    Args:
        values: float32, at least one dimension.

    Returns:
        float32, of ``values``' shape with a last dimension of 1.
    """
    vectors = -(-values.size(-1) // 8)
    partial_sums = min(1024, -(-vectors // 32) * 32)
    rounds = max(1, -(-vectors // partial_sums))
    padded = torch.zeros((*values.shape[:-1], rounds * partial_sums * 8))
    padded[..., : values.size(-1)] = values
    by_vector = _tree(padded.unflatten(-1, (rounds, partial_sums, 8)))
    total = by_vector[..., 0, :]
    for number in range(1, rounds):
        # A partial sum without a vector in this round keeps what it has.
        present = min(partial_sums, vectors - number * partial_sums)
        total = torch.cat([total[..., :present] + by_vector[..., number, :present], total[..., present:]], -1)
    trees = _tree(total.unflatten(-1, (partial_sums // 32, 32)))
    if trees.size(-1) > 1:
        trees = _tree(torch.nn.functional.pad(trees, (0, 32 - trees.size(-1)))).unsqueeze(-1)
    return trees


def _tree(values: Tensor) -> Tensor:
    """Sums along the last dimension, a power of two: elements half of it apart first, down to neighbours."""
    while values.size(-1) > 1:
        first, second = values.chunk(2, -1)
        values = first + second
    return values.squeeze(-1)


def tp_attn_all_reduce_and_layernorm(
    inputs: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str = "rms",
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sum over ranks, plus the residual, and its norm: see ``sgl_comm.ops.tp_attn_all_reduce_and_layernorm``.

    Args:
        inputs: every rank's hidden states, in rank order.
        residual, weight, bias, eps, norm, weight_offset: as for the op.

    Returns:
        The normalised tensor and the new residual, row-major.
    """
    new_residual = all_reduce([all_reduce(inputs), residual])
    values, hidden = new_residual.float(), residual.size(-1)
    if norm == "layer":
        values = values - row_sum(values) / hidden
    mean_square = row_sum(values * values) / hidden + torch.tensor(eps, dtype=torch.float32)
    factor = 1 / torch.sqrt(mean_square.double()).float()  # torch's fp32 root is not always rounded correctly
    out = values * factor * (weight.float() + weight_offset)
    if bias is not None:
        out = out + bias.float()
    return out.to(residual.dtype), new_residual
