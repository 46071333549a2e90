"""What compilers need to know of the ops: shapes of results, and that calls keep their order.

Each op that communicates has an ordered effect: a compiler may not drop, merge or reorder such calls. Effects cover
functional ops only. So an in-place op is *defined* as the functional one and a copy, which is what is traced; an eager
call reaches the in-place kernel of its device.

Inductor of torch 2.11 loses the order of such calls. Lowering an op with an ordered effect, it notes that the op
depends on the one before under the name of the op's buffer, but looks it up under the name of its operation. Its own
``EffectfulKernel`` carries the dependency itself, so our ops are lowered to that, as long as the fault is there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import impl, register_fake

import sgl_comm._library  # noqa: F401  (registers the ops)

_F = TypeVar("_F", bound=Callable[..., Any])

_ordered: list[torch._ops.OpOverload] = []
"""The ops that have an ordered effect."""
_lowered: list[torch._ops.OpOverload] = []
"""Those that Inductor, once it was imported, has been told of."""


def result_of(op: str, input: Tensor, shape: Sequence[int]) -> Tensor:
    """A result of the input's dtype and device, as a fake gives it; refuses an input that requires grad."""
    refuse_grad(op, input)
    _keep_order_in_inductor()
    return input.new_empty(shape)


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Raises ``RuntimeError`` if a tensor requires grad where grad mode is on, as the ops themselves do."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"sgl_comm::{op}: got a tensor that requires grad; expected one that does not (the ops are inference-only)"
        )


def fake(op: str) -> Callable[[_F], _F]:
    """Registers the function below it as the fake of an op that communicates, whose calls keep their order."""

    def register(function: _F) -> _F:
        register_fake(f"sgl_comm::{op}")(function)
        overload = getattr(torch.ops.sgl_comm, op).default
        torch.library._register_effectful_op(overload, torch._library.effects.EffectType.ORDERED)
        _ordered.append(overload)
        return function

    return register


def fake_like_input(op: str) -> None:
    """Registers a fake whose result has the shape of the op's first argument."""

    @fake(op)
    def like_input(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        return result_of(op, input, input.shape)


def in_place_of(op: str) -> None:
    """Defines the in-place form of an op, ``op`` with an underscore, as the op and a copy."""
    name = f"{op}_"

    @impl(f"sgl_comm::{name}", "CompositeImplicitAutograd")
    def in_place(input: Tensor, *args: object) -> None:
        refuse_grad(name, input)
        input.copy_(getattr(torch.ops.sgl_comm, op)(input, *args))


def refuse_compiling(op: str, why: str) -> None:
    """Registers a fake that refuses calls under ``torch.compile``."""

    @register_fake(f"sgl_comm::{op}")
    def refuse(*args: object) -> None:
        raise RuntimeError(f"sgl_comm::{op}: got a call under torch.compile; expected an eager one, {why}")


def _keep_order_in_inductor() -> None:
    """Registers the lowerings, once, if Inductor has been imported; a fake is asked again while tracing."""
    if len(_lowered) == len(_ordered) or "torch._inductor.lowering" not in sys.modules:
        return
    from torch._inductor import ir, lowering
    from torch.utils import _pytree as pytree

    new = _ordered[len(_lowered) :]
    _lowered.extend(new)
    if "get_operation_name" in inspect.getsource(lowering.with_effects):
        return  # this Inductor looks where it has noted

    def lower(op: torch._ops.OpOverload) -> None:
        def lowered(*args: Any, **kwargs: Any) -> Any:
            result = ir.EffectfulKernel.create(op, *args, **kwargs)
            return pytree.tree_map(lambda x: ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x, result)

        lowering.lowerings[op] = lowered

    for op in new:
        lower(op)
