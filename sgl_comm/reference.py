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
