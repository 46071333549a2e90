"""What compilers need to know of the ops: shapes of results, and that calls keep their order.

Each op that communicates has an ordered effect: a compiler may not drop, merge or reorder such calls. Effects cover
functional ops only. So the in-place op is *defined* as the functional one and a copy, which is what is traced; an eager
call reaches the in-place kernel of its device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl, register_fake

import sgl_comm._library  # noqa: F401  (registers the ops)
from sgl_comm import _inductor

_ops = torch.ops.sgl_comm
_EFFECTFUL = (_ops.all_reduce.default, _ops.custom_all_reduce_v2.default)


def _refuse_grad(op: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"sgl_comm::{op}: got a tensor that requires grad; expected one that does not (the ops are inference-only)"
        )


def _result_of(op: str, input: Tensor) -> Tensor:
    _refuse_grad(op, input)
    _inductor.keep_order(_EFFECTFUL)
    return input.new_empty(input.shape)


@register_fake("sgl_comm::all_reduce")
def _all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum") -> Tensor:
    return _result_of("all_reduce", input)


@register_fake("sgl_comm::custom_all_reduce_v2")
def _custom_all_reduce_v2(input: Tensor, group_name: str, algo: str = "auto") -> Tensor:
    return _result_of("custom_all_reduce_v2", input)


@impl("sgl_comm::all_reduce_", "CompositeImplicitAutograd")
def _all_reduce_(input: Tensor, group_name: str, reduce_op: str = "sum") -> None:
    _refuse_grad("all_reduce_", input)
    input.copy_(_ops.all_reduce(input, group_name, reduce_op))


def _register_effects() -> None:
    ordered = torch._library.effects.EffectType.ORDERED
    for op in _EFFECTFUL:
        torch.library._register_effectful_op(op, ordered)


_register_effects()
