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
    for place, tensor in zip(out, inputs, strict=True):
        place.copy_(tensor)
    return out.flatten(0, 1)
