"""``Norm`` is the fused op with a layer's settings; on a first layer there is no residual to add."""

from __future__ import annotations

import pytest
import torch

from helpers.values import generator
from sgl_comm import reference
from sgl_comm.layers import Norm
from sgl_comm.testing import RankContext, bits_equal, run_ranks

BITS = generator("norms")
WEIGHT, BIAS = torch.randn(48, generator=BITS), torch.randn(48, generator=BITS)
VALUES = [torch.randn(5, 48, generator=BITS) for _ in range(2)]
for _values in VALUES:
    _values[0] = -0.0
RESIDUAL = torch.randn(5, 48, generator=BITS)

NORMS = {
    "rms": {"weight": WEIGHT},
    "rms with offset": {"weight": WEIGHT, "weight_offset": 1.0, "eps": 1e-3},
    "layer": {"weight": WEIGHT, "kind": "layer"},
    "layer with bias": {"weight": WEIGHT, "bias": BIAS, "kind": "layer", "eps": 1e-5},
}


def wrong_norms(ctx: RankContext, dtype: torch.dtype, with_residual: bool) -> list[str]:
    assert ctx.comm is not None
    values, wrong = [x.to(dtype) for x in VALUES[: ctx.world]], []
    residual = RESIDUAL.to(dtype) if with_residual else None
    for name, settings in NORMS.items():
        norm = Norm(**settings)  # type: ignore[arg-type]
        normed, after = norm(values[ctx.rank], residual, ctx.comm.group_name)
        before = torch.full_like(values[0], -0.0) if residual is None else residual
        expected = reference.tp_attn_all_reduce_and_layernorm(
            values, before, norm.weight, norm.bias, norm.eps, norm.kind, norm.weight_offset
        )
        if not (bits_equal(normed, expected[0]) and bits_equal(after, expected[1])):
            wrong.append(name)
        if residual is None and not bits_equal(after, reference.all_reduce(values)):
            wrong.append(f"{name}: the residual is not what went in")
    return wrong


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["first layer", "residual"])
def test_a_norm_is_the_fused_op(world: int, dtype: torch.dtype, with_residual: bool) -> None:
    assert run_ranks(wrong_norms, world, dtype, with_residual) == [[]] * world
