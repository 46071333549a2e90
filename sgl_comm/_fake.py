"""What compilers need to know of the ops: shapes of results, and that calls keep their order.

Each op that communicates has an ordered effect: a compiler may not drop, merge or reorder such calls. Effects cover
functional ops only. So the in-place op is *defined* as the functional one and a copy, which is what is traced; an eager
call reaches the in-place kernel of its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

import sgl_comm._library  # noqa: F401  (registers the ops)
from sgl_comm import _inductor

_ops = torch.ops.sgl_comm
_EFFECTFUL = tuple(
    getattr(_ops, name).default
    for name in (
        "all_reduce",
        "custom_all_reduce_v1",
        "custom_all_reduce_v2",
        "reduce_scatter",
        "all_gather",
        "cfg_all_reduce",
        "cfg_broadcast",
        "tp_attn_all_reduce_and_layernorm",
    )
)

world_sizes: dict[str, int] = {}
"""Group name -> how many ranks it has: what a result's shape may depend on. Kept by whoever opens and closes groups."""


def _refuse_grad(op: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"sgl_comm::{op}: got a tensor that requires grad; expected one that does not (the ops are inference-only)"
        )


def _result_of(op: str, input: Tensor, shape: Sequence[int]) -> Tensor:
    _refuse_grad(op, input)
    _inductor.keep_order(_EFFECTFUL)
    return input.new_empty(shape)


def _check_rows(op: str, input: Tensor, group_name: str) -> int:
    """The world size of a group, for an op that joins or divides rows."""
    if group_name not in world_sizes:
        known = ", ".join(map(repr, world_sizes)) or "none"
        raise RuntimeError(
            f"sgl_comm::{op}: unknown group {group_name!r}; call sgl_comm.init(group) first (known: {known})"
        )
    if input.dim() == 0:
        raise RuntimeError(f"sgl_comm::{op}: got a tensor without dimensions; expected at least one dimension")
    return world_sizes[group_name]


@register_fake("sgl_comm::all_reduce")
def _all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum") -> Tensor:
    return _result_of("all_reduce", input, input.shape)


@register_fake("sgl_comm::cfg_all_reduce")
def _cfg_all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum") -> Tensor:
    return _result_of("cfg_all_reduce", input, input.shape)


@register_fake("sgl_comm::cfg_broadcast")
def _cfg_broadcast(input: Tensor, src: int, group_name: str) -> Tensor:
    return _result_of("cfg_broadcast", input, input.shape)


@register_fake("sgl_comm::custom_all_reduce_v1")
def _custom_all_reduce_v1(input: Tensor, group_name: str) -> Tensor:
    return _result_of("custom_all_reduce_v1", input, input.shape)


@register_fake("sgl_comm::custom_all_reduce_v2")
def _custom_all_reduce_v2(input: Tensor, group_name: str, algo: str = "auto") -> Tensor:
    return _result_of("custom_all_reduce_v2", input, input.shape)


@register_fake("sgl_comm::reduce_scatter")
def _reduce_scatter(input: Tensor, group_name: str) -> Tensor:
    world = _check_rows("reduce_scatter", input, group_name)
    rows = input.size(0)
    torch._check(
        rows % world == 0,
        lambda: (
            f"sgl_comm::reduce_scatter: got {rows} rows; expected the size of dim 0 to be a multiple of {world},"
            " the number of ranks"
        ),
    )
    return _result_of("reduce_scatter", input, (rows // world, *input.shape[1:]))


@register_fake("sgl_comm::all_gather")
def _all_gather(input: Tensor, group_name: str) -> Tensor:
    world = _check_rows("all_gather", input, group_name)
    return _result_of("all_gather", input, (input.size(0) * world, *input.shape[1:]))


@register_fake("sgl_comm::tp_attn_all_reduce_and_layernorm")
def _tp_attn_all_reduce_and_layernorm(
    hidden_states: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str = "rms",
    weight_offset: float = 0.0,
    *,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    op = "tp_attn_all_reduce_and_layernorm"
    for tensor in (residual, weight, bias):
        if tensor is not None:
            _refuse_grad(op, tensor)
    return _result_of(op, hidden_states, hidden_states.shape), hidden_states.new_empty(hidden_states.shape)


@impl("sgl_comm::all_reduce_", "CompositeImplicitAutograd")
def _all_reduce_(input: Tensor, group_name: str, reduce_op: str = "sum") -> None:
    _refuse_grad("all_reduce_", input)
    input.copy_(_ops.all_reduce(input, group_name, reduce_op))


@impl("sgl_comm::cfg_all_reduce_", "CompositeImplicitAutograd")
def _cfg_all_reduce_(input: Tensor, group_name: str, reduce_op: str = "sum") -> None:
    _refuse_grad("cfg_all_reduce_", input)
    input.copy_(_ops.cfg_all_reduce(input, group_name, reduce_op))


@impl("sgl_comm::cfg_broadcast_", "CompositeImplicitAutograd")
def _cfg_broadcast_(input: Tensor, src: int, group_name: str) -> None:
    _refuse_grad("cfg_broadcast_", input)
    input.copy_(_ops.cfg_broadcast(input, src, group_name))


@register_fake("sgl_comm::grafter_broadcast_")
def _grafter_broadcast_(input: Tensor, src: int, group_name: str) -> None:
    raise RuntimeError(
        "sgl_comm::grafter_broadcast_: got a call under torch.compile; expected an eager one, as Grafter makes it"
    )


def _register_effects() -> None:
    ordered = torch._library.effects.EffectType.ORDERED
    for op in _EFFECTFUL:
        torch.library._register_effectful_op(op, ordered)


_register_effects()
