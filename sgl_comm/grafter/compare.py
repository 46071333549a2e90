"""How far the received tensor is from the receiver's own."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import sgl_comm._library  # noqa: F401  (registers the ops)

_ops = torch.ops.sgl_comm
_NATIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
_SMALL = 2.0**-100
_SHORT = (torch.float32, torch.bfloat16, torch.float16)
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
        max_ulp: the largest difference in representable values of the dtype (neighbours are 1 apart); None for dtypes
            other than float32, bfloat16, float16 and float64.
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


def can_compare_in_one_pass(tensor: Tensor) -> bool:
    """Whether the package's own op compares tensors like this one."""
    return tensor.is_cpu and tensor.dtype in _NATIVE


def compare(theirs: Tensor, ours: Tensor, baseline_is_theirs: bool) -> Comparison:
    """Compares two tensors of one shape, dtype and device; ``rel_l2`` is relative to the baseline's."""
    theirs, ours = (each.resolve_conj().resolve_neg() for each in (theirs, ours))
    totals = _ops._grafter_compare(theirs, ours) if can_compare_in_one_pass(ours) else _totals(theirs, ours)
    return comparison_of(ours, totals, baseline_is_theirs)


def _totals(theirs: Tensor, ours: Tensor) -> Tensor:
    """What ``_grafter_compare`` gives, in plain PyTorch: for devices and dtypes that the op does not take."""
    if theirs.dtype in _SHORT:
        found = _totals_of_finite(theirs, ours)
        # As the op does: squares may also be too small for fp32.
        if found.isfinite().all() and (found[1] == 0 or found[6:9].min() >= _SMALL):
            return found
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
    sums = [(x * x).sum(), (y * y).sum(), (d * d).sum(), _largest(d), _largest(ulp)]
    return _row(*counts, *sums)


def _totals_of_finite(theirs: Tensor, ours: Tensor) -> Tensor:
    """``_totals`` with a quarter of the traffic; some total is not finite where a number or its fp32 square is not."""
    a, b = theirs.to(torch.float32), ours.to(torch.float32)
    bits = _BITS[theirs.dtype]
    differing = (theirs.contiguous().view(bits) != ours.contiguous().view(bits)).sum()
    d = a - b
    sums = [(x * x).sum(dtype=torch.float64) for x in (a, b, d)]
    nothing = torch.zeros_like(differing)
    return _row(nothing + a.numel(), differing, *[nothing] * 4, *sums, _largest(d.abs()), _largest(_ulps(theirs, ours)))


def _row(*totals: Tensor) -> Tensor:
    return torch.stack([value.to(torch.float64) for value in totals]).cpu()


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.sum()


def _bytes(tensor: Tensor) -> Tensor:
    """(numel, bytes of an element)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values two floats are apart."""
    bits = _BITS[a.dtype]
    p, q = (each.contiguous().view(bits) for each in (a, b))
    size = torch.iinfo(bits).max
    x, y = ((each & size).to(torch.int64 if bits == torch.int64 else torch.int32) for each in (p, q))
    apart = (x - y).abs()
    # Of unlike signs: the sum, which is out of the integers' range for the largest numbers.
    return torch.where((p ^ q) < 0, x.to(torch.float64) + y, apart)


def comparison_of(ours: Tensor, totals: Tensor, baseline_is_theirs: bool) -> Comparison:
    """The comparison made of the totals that ``_grafter_compare`` or ``_grafter_receive_`` gave."""
    _, differing, nan_a, nan_b, inf_a, inf_b, aa, bb, dd, max_abs, max_ulp = totals.tolist()
    base = aa if baseline_is_theirs else bb
    if dd == 0:
        rel_l2 = 0.0
    else:
        rel_l2 = math.sqrt(dd) / math.sqrt(base) if base > 0 else math.inf
    norms = math.sqrt(aa) * math.sqrt(bb)
    # Rounding may take it a little too far. A NaN, of numbers whose squares overflow, stays one.
    cosine = min(max((aa + bb - dd) / 2 / norms, -1.0), 1.0) if norms > 0 else float(aa == bb)
    return Comparison(
        ours.numel(), int(differing), cosine, rel_l2, max_abs, int(max_ulp) if ours.dtype in _BITS else None,
        (int(nan_a), int(nan_b)), (int(inf_a), int(inf_b)),
    )  # fmt: skip
