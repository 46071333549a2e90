"""How far the received tensor is from the receiver's own."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import sgl_comm._library  # noqa: F401  (registers the ops)

_ops = torch.ops.sgl_comm
_NATIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A received tensor ("theirs") against the receiver's own ("ours"). Sums and maxima are of finite pairs alone.

    Attributes:
        numel: how many pairs.
        differing: pairs whose bits are not the same.
        cosine: of the angle between the two; 1 where both are zero.
        rel_l2: the norm of the difference over the norm of the baseline's tensor; infinite where that alone is zero.
        max_abs: the largest difference.
        max_ulp: the same in representable values of the dtype (neighbours are 1 apart); None for other dtypes than
            float32, bfloat16, float16 and float64.
        nan, inf: how many NaNs and infinities (theirs, ours).
    """

    numel: int
    differing: int
    cosine: float
    rel_l2: float
    max_abs: float
    max_ulp: int | None
    nan: tuple[int, int]
    inf: tuple[int, int]


def compare(theirs: Tensor, ours: Tensor, take: bool, baseline_is_theirs: bool) -> Comparison:
    """Compares, and with ``take`` writes theirs into ours, whatever its strides.

    Args:
        theirs: row-major, of the shape, dtype and device of ``ours``.
        ours: any strides.
        take: whether ours becomes theirs.
        baseline_is_theirs: whose norm ``rel_l2`` is relative to.
    """
    in_place = take and ours.is_contiguous()
    if ours.is_cpu and ours.dtype in _NATIVE:
        totals = _ops._grafter_compare_(theirs, ours.contiguous(), in_place).tolist()
    else:
        totals, in_place = _totals(theirs, ours), False
    if take and not in_place:
        ours.copy_(theirs)
    return _comparison(ours.numel(), ours.dtype, totals, baseline_is_theirs)


def _totals(theirs: Tensor, ours: Tensor) -> list[float]:
    """What the op gives, in plain PyTorch: for other devices and dtypes."""
    differing = (_bytes(theirs) != _bytes(ours)).any(-1).sum()
    if theirs.is_complex():
        theirs, ours = torch.view_as_real(theirs), torch.view_as_real(ours)
    a, b = theirs.to(torch.float64), ours.to(torch.float64)
    finite = a.isfinite() & b.isfinite()
    counts = [finite.sum(), differing, a.isnan().sum(), b.isnan().sum(), a.isinf().sum(), b.isinf().sum()]
    difference = (a - b).abs()
    if theirs.dtype == torch.int64:
        difference = (torch.maximum(theirs, ours) - torch.minimum(theirs, ours)).to(torch.float64)
    apart = _ulps(theirs, ours) if theirs.dtype in _BITS else torch.zeros_like(a)
    x, y, d, ulp = (torch.where(finite, values, 0) for values in (a, b, difference, apart))
    largest = [values.max() if values.numel() else values.sum() for values in (d, ulp)]
    sums = [(x * y).sum(), (x * x).sum(), (y * y).sum(), (d * d).sum(), *largest]
    return torch.stack([value.to(torch.float64) for value in (*counts, *sums)]).tolist()


def _bytes(tensor: Tensor) -> Tensor:
    """(numel, bytes of an element)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values lie between two floats; float64, since it is only shown."""
    bits = _BITS[a.dtype]
    sizes = [x.contiguous().view(bits).to(torch.float64) for x in (a.abs(), b.abs())]
    same_sign = a.signbit() == b.signbit()
    return torch.where(same_sign, (sizes[0] - sizes[1]).abs(), sizes[0] + sizes[1])


def _comparison(numel: int, dtype: torch.dtype, totals: list[float], baseline_is_theirs: bool) -> Comparison:
    _, differing, nan_a, nan_b, inf_a, inf_b, product, aa, bb, dd, max_abs, max_ulp = totals
    base = aa if baseline_is_theirs else bb
    if dd == 0:
        rel_l2 = 0.0
    else:
        rel_l2 = math.sqrt(dd) / math.sqrt(base) if base > 0 else math.inf
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = product / norms if norms > 0 else float(aa == bb)
    return Comparison(
        numel, int(differing), max(-1.0, min(1.0, cosine)), rel_l2, max_abs, int(max_ulp) if dtype in _BITS else None,
        (int(nan_a), int(nan_b)), (int(inf_a), int(inf_b)),
    )  # fmt: skip
