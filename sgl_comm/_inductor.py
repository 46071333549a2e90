"""Keeps our calls in order where Inductor would not by itself: torch 2.11, and as long as the fault below is there.

Lowering an op with an ordered effect, Inductor notes that it depends on the one before under the name of the op's
buffer, but looks it up under the name of its operation; the dependency is lost and calls may change places. Inductor's
own ``EffectfulKernel`` carries the dependency itself, so our ops are lowered to that.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch

_done = False


def keep_order(ops: Iterable[torch._ops.OpOverload]) -> None:
    """Registers the lowerings, once, if Inductor has been imported; else does nothing, so ask again while tracing."""
    global _done
    if _done or "torch._inductor.lowering" not in sys.modules:
        return
    _done = True
    from torch._inductor import ir, lowering
    from torch.utils import _pytree as pytree

    if "get_operation_name" in inspect.getsource(lowering.with_effects):
        return  # this Inductor looks where it has noted

    def lower(op: torch._ops.OpOverload) -> None:
        def lowered(*args: Any, **kwargs: Any) -> Any:
            result = ir.EffectfulKernel.create(op, *args, **kwargs)
            return pytree.tree_map(lambda x: ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x, result)

        lowering.lowerings[op] = lowered

    for op in ops:
        lower(op)
