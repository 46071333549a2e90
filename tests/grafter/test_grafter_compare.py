"""The figures of a comparison against plain float64 arithmetic, on both devices and for every dtype."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_comm import testing
from sgl_comm.grafter.compare import Comparison, compare
from sgl_comm.grafter.header import DTYPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def values(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 100, (count,), generator=chance).to(dtype)
    return torch.randn(count, generator=chance).to(dtype)


def expected(theirs: Tensor, ours: Tensor, baseline_is_theirs: bool) -> dict[str, Any]:
    """By hand, one Python float at a time would be too slow: float64 over the finite pairs."""
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (theirs, ours))
    a, b = a.double().flatten(), b.double().flatten()
    keep = a.isfinite() & b.isfinite()
    x, y = a[keep], b[keep]
    base = x if baseline_is_theirs else y
    error, norm = (x - y).norm().item(), base.norm().item()
    return {
        "rel_l2": 0.0 if error == 0 else error / norm if norm else math.inf,
        "cosine": (x @ y).item() / (x.norm() * y.norm()).item() if x.norm() * y.norm() > 0 else None,
        "max_abs": (x - y).abs().max().item() if len(x) else 0.0,
        "nan": (int(a.isnan().sum()), int(b.isnan().sum())),
        "inf": (int(a.isinf().sum()), int(b.isinf().sum())),
    }


def assert_right(found: Comparison, theirs: Tensor, ours: Tensor, baseline_is_theirs: bool = True) -> None:
    wanted = expected(theirs, ours, baseline_is_theirs)
    assert found.numel == ours.numel()
    assert found.nan == wanted["nan"]
    assert found.inf == wanted["inf"]
    assert found.max_abs == pytest.approx(wanted["max_abs"], rel=1e-6)
    assert found.rel_l2 == pytest.approx(wanted["rel_l2"], rel=1e-4)
    if wanted["cosine"] is not None:
        assert found.cosine == pytest.approx(wanted["cosine"], rel=1e-5, abs=1e-6)
    same = (
        [x.contiguous().view(-1, 1).view(torch.uint8).view(x.numel(), -1) for x in (theirs, ours)]
        if ours.numel()
        else []
    )
    assert found.differing == (int((same[0] != same[1]).any(1).sum()) if same else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(DTYPES))
def test_every_dtype_has_right_figures(device: str, name: str) -> None:
    dtype = DTYPES[name]
    for count in (0, 1, 5, 2048, 70_001):
        theirs, ours = values(count, dtype, 1), values(count, dtype, 2)
        ours[: count // 2] = theirs[: count // 2]
        for baseline_is_theirs in (True, False):
            found = compare(theirs.to(device), ours.to(device), baseline_is_theirs)
            assert_right(found, theirs, ours, baseline_is_theirs)
            assert (found.max_ulp is None) == (dtype not in FLOATS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_no_numbers_are_counted_and_left_out(device: str, dtype: torch.dtype) -> None:
    special = testing.special_values(dtype)
    theirs = special.repeat_interleave(len(special)).repeat(20)
    ours = special.repeat(len(special)).repeat(20)
    found = compare(theirs.to(device), ours.to(device), True)
    # Of the largest numbers the squares overflow fp64, where the dtype is that.
    wanted = expected(theirs, ours, True)
    assert (found.nan, found.inf) == (wanted["nan"], wanted["inf"])
    assert found.max_abs == wanted["max_abs"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_values_do_not_overflow(device: str, dtype: torch.dtype) -> None:
    """Their squares overflow fp32."""
    size = min(1e25, torch.finfo(dtype).max / 4)
    theirs = (values(5000, torch.float64, 3).clamp(-2, 2) * size).to(dtype)
    ours = (theirs.double() * 1.5).to(dtype)
    assert_right(compare(theirs.to(device), ours.to(device), True), theirs, ours)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_count_representable_values(device: str, dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    one = torch.ones(3000, dtype=dtype)
    for apart in (0, 1, 5):
        ours = (one.view(bits) + apart).view(dtype)
        assert compare(one.to(device), ours.to(device), True).max_ulp == apart
    smallest = torch.ones(3000, dtype=bits).view(dtype)
    assert compare(smallest.to(device), (-smallest).to(device), True).max_ulp == 2
    assert compare((smallest * 0).to(device), (smallest * -0.0).to(device), True).max_ulp == 0


@pytest.mark.parametrize("device", DEVICES)
def test_int64_differences_are_exact(device: str) -> None:
    theirs = torch.tensor([1 << 62, -(1 << 62), 5])
    ours = torch.tensor([(1 << 62) + 1, -(1 << 62), 5])
    found = compare(theirs.to(device), ours.to(device), True)
    assert (found.differing, found.max_abs, found.max_ulp) == (1, 1.0, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_tensors_of_any_strides(device: str, dtype: torch.dtype) -> None:
    shape = (3, 5, 7)
    theirs = values(105, dtype, 4).view(shape)
    for layout in testing.layouts(shape).values():
        placed = layout(values(105, dtype, 5).view(shape).to(device))
        found = compare(theirs.to(device), placed.tensor, True)
        assert_right(found, theirs, placed.values.cpu())
        assert compare(placed.tensor, theirs.to(device), False).rel_l2 == pytest.approx(found.rel_l2, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_values_do_not_vanish(device: str, dtype: torch.dtype) -> None:
    """Their squares are too small for fp32."""
    for size in (1e-20, 1e-25, 1e-30):
        theirs = (values(5000, torch.float64, 8) * size).to(dtype)
        for ours in (theirs * 2, -theirs, torch.zeros_like(theirs)):
            assert_right(compare(theirs.to(device), ours.to(device), True), theirs, ours)


def test_the_cores_do_not_change_the_figures() -> None:
    """Large tensors are compared by as many threads as there are cores."""
    theirs, ours = values(6_000_000, torch.float32, 6), values(6_000_000, torch.float32, 7)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        alone = compare(theirs, ours, True)
    finally:
        os.sched_setaffinity(0, cores)
    together = compare(theirs, ours, True)
    assert alone == together
    assert_right(together, theirs, ours)
