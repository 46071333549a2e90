"""A sum over ranks that has not been made yet, as a type of its own."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sgl_comm.errors import SglCommError

_OPERATORS = """
    radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul neg pos abs
    iadd isub imul itruediv imatmul eq ne lt le gt ge bool float int index len getitem setitem iter array
    copy deepcopy reduce_ex
"""


class PartialSum:
    """One rank's addend of a sum over a group, before the sum is made.

    What a row-parallel layer computes is such an addend. It is no tensor: only a ``LayerCommunicator`` makes one of it,
    by a collective, and once. All that model code can do with it is to add another one of the same group
    (``routed + shared``), so that both are reduced together; this uses up the two.

    Args:
        tensor: this rank's addend, of any shape and dtype; it must not be changed afterwards.
        group_name: the group over which the sum will be.

    Raises:
        SglCommError: ``tensor`` is not a tensor; later, any use as one.
    """

    __slots__ = ("_tensor", "group_name")

    def __init__(self, tensor: Tensor, group_name: str) -> None:
        if not isinstance(tensor, Tensor):
            raise SglCommError(f"PartialSum: got {_kind(tensor)}; expected a tensor")
        self._tensor: Tensor | None = tensor
        self.group_name = group_name

    def __add__(self, other: object) -> PartialSum:
        if not isinstance(other, PartialSum):
            raise _misuse(f"it was added to {_kind(other)}")
        if other.group_name != self.group_name:
            raise SglCommError(
                f"PartialSum: got addends of the groups {self.group_name!r} and {other.group_name!r}; expected two of"
                " one group: the sums are over different ranks, so each must be reduced by itself"
            )
        if other is self:
            raise SglCommError("PartialSum: it was added to itself; expected two different addends")
        mine, theirs = self._peek(), other._peek()
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise SglCommError(
                f"PartialSum: got addends of {tuple(mine.shape)} {mine.dtype} and {tuple(theirs.shape)} {theirs.dtype};"
                " expected one shape and dtype"
            )
        self._tensor = other._tensor = None
        return PartialSum(mine + theirs, self.group_name)

    def _peek(self) -> Tensor:
        if self._tensor is None:
            raise SglCommError(
                "PartialSum: it has been used already, reduced or added to another; expected each to be reduced once:"
                " go on with the result of that"
            )
        return self._tensor

    def __repr__(self) -> str:
        what = "used" if self._tensor is None else f"{tuple(self._tensor.shape)} {self._tensor.dtype}"
        return f"PartialSum({what}, not yet reduced over group {self.group_name!r})"

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_") and hasattr(Tensor, name):
            raise _misuse(f"its .{name} was asked for")
        raise AttributeError(f"PartialSum has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _misuse(f"it was passed to {torch.overrides.resolve_name(func) or getattr(func, '__name__', func)}")


def take(partial: PartialSum, group_name: str, where: str) -> Tensor:
    """This rank's addend, for whoever reduces it at once. Not for model code.

    Args:
        partial: it counts as reduced afterwards.
        group_name: the group of the collective.
        where: begins the text of an error.

    Raises:
        SglCommError: it is of another group, or was used already.
    """
    if partial.group_name != group_name:
        raise SglCommError(
            f"{where}: got a PartialSum of group {partial.group_name!r}; expected one of group {group_name!r}"
        )
    tensor = partial._peek()
    partial._tensor = None
    return tensor


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"something of type {type(value).__name__}"


def _misuse(what: str) -> SglCommError:
    return SglCommError(
        f"PartialSum: {what}, but it is a sum over ranks that has not been made yet; expected it to go to the"
        " LayerCommunicator (prepare_mlp after attention, postprocess_layer after the MLP), or to be added to another"
        " PartialSum of the same group"
    )


def _refuse(name: str) -> Any:
    def operator(self: PartialSum, *_: object) -> NoReturn:
        raise _misuse(f"__{name}__ was called on it")

    operator.__name__ = f"__{name}__"
    return operator


for _name in _OPERATORS.split():
    setattr(PartialSum, f"__{_name}__", _refuse(_name))
