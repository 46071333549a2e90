"""What compilers need to know of the ops: shapes of results, and that calls keep their order.

Each op that communicates has an ordered effect: a compiler may not drop, merge or reorder such calls. Effects cover
functional ops; ``all_reduce_`` is traced as ``all_reduce`` and a copy (csrc/fallback.cpp), so the same orders it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

import sgl_comm._library  # noqa: F401  (registers the ops)

_EFFECTFUL = ("all_reduce", "custom_all_reduce_v2")


def _refuse_grad(op: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"sgl_comm::{op}: got a tensor that requires grad; expected one that does not (the ops are inference-only)"
        )


def _row_major_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


@register_fake("sgl_comm::all_reduce")
def _all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum") -> Tensor:
    _refuse_grad("all_reduce", input)
    return _row_major_like(input)


@register_fake("sgl_comm::custom_all_reduce_v2")
def _custom_all_reduce_v2(input: Tensor, group_name: str, algo: str = "auto") -> Tensor:
    _refuse_grad("custom_all_reduce_v2", input)
    return _row_major_like(input)


def _register_effects() -> None:
    effects = torch._library.effects.EffectType
    for name in _EFFECTFUL:
        torch.library._register_effectful_op(f"sgl_comm::{name}", effects.ORDERED)


_register_effects()
