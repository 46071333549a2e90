"""The ops of ``torch.ops.sgl_comm`` as typed functions, whose errors are ``SglCommError``.

Below each function stands what compilers need of its op; ``GroupOps`` at the end has the ops as methods of a group.
``docs/usage.md`` says what serves which op on which device, and ``Communicator.explain`` what serves one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from sgl_comm import _compiler
from sgl_comm.backends import open_groups
from sgl_comm.errors import SglCommError
from sgl_comm.work import Work, start

_ops = torch.ops.sgl_comm


@contextmanager
def own_errors() -> Iterator[None]:
    """Turns a ``RuntimeError`` of ``torch.ops`` into ``SglCommError``, with the same text; other types pass."""
    try:
        yield
    except RuntimeError as error:
        _raise_own(error)


def _raise_own(error: RuntimeError) -> NoReturn:
    if type(error) is not RuntimeError:
        raise error
    raise SglCommError(str(error)) from None


def _call(op: torch._ops.OpOverloadPacket, *args: Any, **kwargs: Any) -> Any:
    """Calls an op; its errors are ``SglCommError`` unless a compiler is tracing."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        _raise_own(error)


def _call_or_start(op: torch._ops.OpOverloadPacket, args: tuple[Any, ...], async_op: bool) -> Any:
    """Calls an op or, with ``async_op``, starts it on a stream of its own and gives its ``Work``."""
    if not async_op:
        return _call(op, *args)
    if torch.compiler.is_compiling():
        raise SglCommError(f"sgl_comm::{op.__name__}: got async_op=True under torch.compile; expected False")
    with own_errors():
        return start(lambda: op(*args), args[0])


def all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum") -> Tensor:
    """The sum of every rank's ``input``; the front door, always right.

    Sums of float32, bfloat16 and float16 are added in fp32 in rank order and rounded once, so that every rank has the
    same bits whatever the size, backend or layout. Other dtypes and reduce ops go to NCCL or gloo, which promise no
    order.

    Args:
        input: any shape and strides, alike in shape and dtype on all ranks; must not require grad.
        group_name: the name of a group given to ``sgl_comm.init``.
        reduce_op: "sum", "avg", "product", "min", "max", "band", "bor" or "bxor".

    Returns:
        A new row-major tensor of the input's shape, dtype and device, which aliases nothing, also at world size 1.

    Raises:
        SglCommError: unknown or closed group, bad input, or a peer that died or did not come in time.
    """
    return _call(_ops.all_reduce, input, group_name, reduce_op)


_compiler.fake_like_input("all_reduce")


def all_reduce_(input: Tensor, group_name: str, reduce_op: str = "sum") -> None:
    """``all_reduce`` in place: the caller's own tensor holds the result, whatever its strides.

    Args and errors as for ``all_reduce``; a tensor that overlaps itself (``expand``) is refused unsent.
    """
    _call(_ops.all_reduce_, input, group_name, reduce_op)


_compiler.in_place_of("all_reduce")


def reduce_scatter(input: Tensor, group_name: str) -> Tensor:
    """This rank's share of the sum of every rank's ``input``, divided along dim 0: the first half of an all-reduce.

    The bits are those of ``all_reduce``'s rows. float32, bfloat16 and float16 are added in fp32 in rank order and
    rounded once; other dtypes go to NCCL or gloo, which promise no order.

    Args:
        input: any strides, alike in shape and dtype on all ranks; the size of dim 0 must be a multiple of the group's
            world size (0 is one); must not require grad.
        group_name: the name of a group given to ``sgl_comm.init``.

    Returns:
        A new row-major tensor of shape ``[input.size(0) // world_size, ...]``, of the input's dtype and device: rank
        r's are the r-th rows. It aliases nothing, also at world size 1.

    Raises:
        SglCommError: a tensor that cannot be divided, unknown or closed group, bad input, or a peer that died or did
            not come in time.
    """
    return _call(_ops.reduce_scatter, input, group_name)


@_compiler.fake("reduce_scatter")
def _reduce_scatter_fake(input: Tensor, group_name: str) -> Tensor:
    world = _world_size_for_rows("reduce_scatter", input, group_name)
    rows = input.size(0)
    torch._check(
        rows % world == 0,
        lambda: (
            f"sgl_comm::reduce_scatter: got {rows} rows; expected the size of dim 0 to be a multiple of {world},"
            " the number of ranks"
        ),
    )
    return _compiler.result_of("reduce_scatter", input, (rows // world, *input.shape[1:]))


def all_gather(input: Tensor, group_name: str) -> Tensor:
    """Every rank's ``input``, one after the other along dim 0, in rank order: the second half of an all-reduce.

    Bit for bit, for every dtype, also through NCCL or gloo.

    Args:
        input: at least one dimension, any strides, alike in shape and dtype on all ranks; must not require grad.
        group_name: the name of a group given to ``sgl_comm.init``.

    Returns:
        A new row-major tensor of shape ``[input.size(0) * world_size, ...]``, of the input's dtype and device. It
        aliases nothing, also at world size 1.

    Raises:
        SglCommError: unknown or closed group, bad input, or a peer that died or did not come in time.
    """
    return _call(_ops.all_gather, input, group_name)


@_compiler.fake("all_gather")
def _all_gather_fake(input: Tensor, group_name: str) -> Tensor:
    world = _world_size_for_rows("all_gather", input, group_name)
    return _compiler.result_of("all_gather", input, (input.size(0) * world, *input.shape[1:]))


def _world_size_for_rows(op: str, input: Tensor, group_name: str) -> int:
    """The world size of a group, for the fake of an op that joins or divides rows."""
    world = open_groups.world_size(op, group_name)
    if input.dim() == 0:
        raise RuntimeError(f"sgl_comm::{op}: got a tensor without dimensions; expected at least one dimension")
    return world


def cfg_all_reduce(input: Tensor, group_name: str, reduce_op: str = "sum", async_op: bool = False) -> Tensor | Work:
    """``all_reduce`` for tensors of any layout, as diffusion models have under classifier-free-guidance parallelism.

    Element (i, j) is summed with (i, j), whatever the strides, in which ranks may differ. The bits are
    ``all_reduce``'s, and so is the path: a row-major tensor is not copied.

    Args:
        input: any shape and strides, alike in shape and dtype on all ranks; must not require grad.
        group_name: the name of a group given to ``sgl_comm.init``.
        reduce_op: as for ``all_reduce``.
        async_op: give a ``Work`` at once, whose ``wait()`` gives the result. Not under ``torch.compile``.

    Returns:
        A new row-major tensor of the input's shape, dtype and device, which aliases nothing, also at world size 1.

    Raises:
        SglCommError: unknown or closed group, bad input, or a peer that died or did not come in time. A call that every
            rank refuses leaves the group as it was; one that some ranks refuse and others make ends it, on all, where
            shared memory or this package's kernels serve the call.
    """
    return _call_or_start(_ops.cfg_all_reduce, (input, group_name, reduce_op), async_op)


_compiler.fake_like_input("cfg_all_reduce")


def cfg_all_reduce_(input: Tensor, group_name: str, reduce_op: str = "sum", async_op: bool = False) -> Work | None:
    """``cfg_all_reduce`` in place: the caller's own tensor holds the result, and what lies between strides stays.

    Args, ``Work`` and errors as for ``cfg_all_reduce``; a tensor that overlaps itself (``expand``) is refused unsent.
    """
    return _call_or_start(_ops.cfg_all_reduce_, (input, group_name, reduce_op), async_op)


_compiler.in_place_of("cfg_all_reduce")


def cfg_broadcast(input: Tensor, src: int, group_name: str, async_op: bool = False) -> Tensor | Work:
    """Rank ``src``'s ``input``, bit for bit, for every dtype and any strides, in which ranks may differ.

    Args:
        input: alike in shape and dtype on all ranks; must not require grad. Only ``src``'s values matter.
        src: a rank of the group, from 0.
        group_name: the name of a group given to ``sgl_comm.init``.
        async_op: give a ``Work`` at once, whose ``wait()`` gives the result. Not under ``torch.compile``.

    Returns:
        A new row-major tensor of the input's shape, dtype and device, which aliases nothing, also on ``src``.

    Raises:
        SglCommError: as for ``cfg_all_reduce``; or ``src`` is no rank of the group. ``src`` does not wait for its
            peers: that one has not come, or has made another call, it may learn in its next call only.
    """
    return _call_or_start(_ops.cfg_broadcast, (input, src, group_name), async_op)


_compiler.fake_like_input("cfg_broadcast")


def cfg_broadcast_(input: Tensor, src: int, group_name: str, async_op: bool = False) -> Work | None:
    """``cfg_broadcast`` in place: the caller's own tensor holds the result, and what lies between strides stays.

    Args, ``Work`` and errors as for ``cfg_broadcast``; a tensor that overlaps itself (``expand``) is refused unsent,
    also on ``src``.
    """
    return _call_or_start(_ops.cfg_broadcast_, (input, src, group_name), async_op)


_compiler.in_place_of("cfg_broadcast")


def tp_attn_all_reduce_and_layernorm(
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
    """What stands between two halves of a decoder layer: the sum over ranks, the residual, and the norm.

    With h the sum of every rank's ``hidden_states`` as ``all_reduce`` gives it, the new residual is h + ``residual``,
    rounded once, and the first result its norm along the last dimension: statistics and values in fp32 from the new
    residual, rounded once at the end. The sum along a row is a tree that depends on its length alone (csrc/norm.h), so
    that a token's bits are the same alone and in any batch, and on CPU and CUDA.

    RMSNorm (Zhang and Sennrich, 2019): ``r / sqrt(mean(r^2) + eps) * (weight + weight_offset)``. LayerNorm (Ba, Kiros
    and Hinton, 2016): ``(r - mean(r)) / sqrt(mean((r - mean(r))^2) + eps) * (weight + weight_offset) + bias``.

    Args:
        hidden_states: ``[..., hidden]``, float32, bfloat16 or float16, any strides; this rank's part of the sum. May
            have no elements, on all ranks.
        residual: of the same shape, dtype and device; the same on all ranks.
        weight: ``[hidden]``, of float32 or of ``hidden_states``' dtype.
        bias: the same, or None; None with ``norm="rms"``.
        eps: added to the mean of squares; at least 0.
        norm: "rms" or "layer".
        weight_offset: added to each weight in fp32, as for models that store ``weight - 1``.
        group_name: the name of a group given to ``sgl_comm.init``.

    Returns:
        The normalised tensor and the new residual, both new and row-major, of ``hidden_states``' shape, dtype and
        device.

    Raises:
        SglCommError: arguments that do not go together, unknown or closed group, an input that requires grad, or a peer
            that died or did not come in time.
    """
    args = (hidden_states, residual, weight, bias, eps, norm, weight_offset)
    return _call(_ops.tp_attn_all_reduce_and_layernorm, *args, group_name=group_name)


@_compiler.fake("tp_attn_all_reduce_and_layernorm")
def _tp_attn_all_reduce_and_layernorm_fake(
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
    _compiler.refuse_grad(op, residual, weight, bias)
    shape = hidden_states.shape
    return _compiler.result_of(op, hidden_states, shape), hidden_states.new_empty(shape)


def custom_all_reduce_v1(input: Tensor, group_name: str) -> Tensor:
    """The sum of every rank's ``input`` by the pull kernels; an error, never a fallback, where they cannot.

    Args:
        input: a CUDA tensor of float32, bfloat16 or float16, any shape and strides.
        group_name: the name of a group given to ``sgl_comm.init`` with a CUDA device.

    Returns:
        A new row-major tensor of the input's shape, dtype and device; the same bits as ``all_reduce``'s.

    Raises:
        SglCommError: a CPU tensor, another dtype, a group that the kernels do not serve, or a failed communicator.
    """
    return _call(_ops.custom_all_reduce_v1, input, group_name)


_compiler.fake_like_input("custom_all_reduce_v1")


def custom_all_reduce_v2(input: Tensor, group_name: str, algo: str = "auto") -> Tensor:
    """The sum of every rank's ``input`` by the push kernels; an error, never a fallback, where they cannot.

    Args:
        input: a CUDA tensor of float32, bfloat16 or float16, any shape and strides.
        group_name: the name of a group given to ``sgl_comm.init`` with a CUDA device.
        algo: "auto"; "one_shot" (all to all) or "two_shot" (each rank sums a part), in pieces where the workspace
            cannot hold the message; "one_shot_ring" or "two_shot_ring", in pieces whatever the size.

    Returns:
        A new row-major tensor of the input's shape, dtype and device; the same bits whatever the algorithm.

    Raises:
        SglCommError: a CPU tensor, another dtype, a group that the kernels do not serve, or a failed communicator.
    """
    return _call(_ops.custom_all_reduce_v2, input, group_name, algo)


_compiler.fake_like_input("custom_all_reduce_v2")


def grafter_broadcast_(input: Tensor, src: int, group_name: str) -> None:
    """Rank ``src``'s ``input`` into the others', bit for bit, between two running systems that ``Grafter`` has joined.

    Args:
        input: any dtype, device and strides, alike in shape and dtype on all ranks; only ``src``'s values matter.
        src: a rank of the group, from 0.
        group_name: the name of one of the grafter's groups.

    Raises:
        SglCommError: as for ``cfg_broadcast_``; or the call is inside a CUDA graph capture or under ``torch.compile``,
            since a replay could not reach the other system.
    """
    _call(_ops.grafter_broadcast_, input, src, group_name)


_compiler.refuse_compiling("grafter_broadcast_", "as Grafter makes it")


class GroupOps:
    """The ops of one group, whose name its subclass has: what ``Communicator`` offers as methods."""

    group_name: str

    def all_reduce(self, input: Tensor, reduce_op: str = "sum") -> Tensor:
        """The sum of every rank's ``input``, as a new row-major tensor. See ``sgl_comm.ops.all_reduce``."""
        return all_reduce(input, self.group_name, reduce_op)

    def all_reduce_(self, input: Tensor, reduce_op: str = "sum") -> None:
        """``all_reduce`` in place, for any strides. See ``sgl_comm.ops.all_reduce_``."""
        all_reduce_(input, self.group_name, reduce_op)

    def reduce_scatter(self, input: Tensor) -> Tensor:
        """This rank's share of the sum, divided along dim 0. See ``sgl_comm.ops.reduce_scatter``."""
        return reduce_scatter(input, self.group_name)

    def all_gather(self, input: Tensor) -> Tensor:
        """Every rank's ``input`` along dim 0, in rank order. See ``sgl_comm.ops.all_gather``."""
        return all_gather(input, self.group_name)

    def cfg_all_reduce(self, input: Tensor, reduce_op: str = "sum", async_op: bool = False) -> Tensor | Work:
        """``all_reduce`` for tensors of any layout. See ``sgl_comm.ops.cfg_all_reduce``."""
        return cfg_all_reduce(input, self.group_name, reduce_op, async_op)

    def cfg_all_reduce_(self, input: Tensor, reduce_op: str = "sum", async_op: bool = False) -> Work | None:
        """``cfg_all_reduce`` in place. See ``sgl_comm.ops.cfg_all_reduce_``."""
        return cfg_all_reduce_(input, self.group_name, reduce_op, async_op)

    def cfg_broadcast(self, input: Tensor, src: int, async_op: bool = False) -> Tensor | Work:
        """Rank ``src``'s ``input``, bit for bit. See ``sgl_comm.ops.cfg_broadcast``."""
        return cfg_broadcast(input, src, self.group_name, async_op)

    def cfg_broadcast_(self, input: Tensor, src: int, async_op: bool = False) -> Work | None:
        """``cfg_broadcast`` in place. See ``sgl_comm.ops.cfg_broadcast_``."""
        return cfg_broadcast_(input, src, self.group_name, async_op)
