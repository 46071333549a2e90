"""A sum that has not been made cannot be used as a tensor, nor be made twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_comm import SglCommError
from sgl_comm.layers import PartialSum
from sgl_comm.layers.partial_sum import take

X = torch.arange(6.0).view(2, 3)

ADVICE = (
    " but it is a sum over ranks that has not been made yet; expected it to go to the LayerCommunicator (prepare_mlp"
    " after attention, postprocess_layer after the MLP), or to be added to another PartialSum of the same group"
)
USED = (
    "PartialSum: it has been used already, reduced or added to another; expected each to be reduced once: go on with"
    " the result of that"
)

MISUSES: dict[str, tuple[Callable[[PartialSum], Any], str]] = {
    "tensor plus it": (lambda p: X + p, "it was passed to torch.Tensor.add,"),
    "it plus tensor": (lambda p: p + X, "it was added to a tensor,"),
    "it plus number": (lambda p: p + 1, "it was added to something of type int,"),
    "number plus it": (lambda p: 0 + p, "__radd__ was called on it,"),
    "built-in sum": (lambda p: sum([p]), "__radd__ was called on it,"),
    "in place": (lambda p: X.clone().add_(p), "it was passed to torch.Tensor.add_,"),
    "scaled": (lambda p: p * 2, "__mul__ was called on it,"),
    "divided": (lambda p: p / 2, "__truediv__ was called on it,"),
    "negated": (lambda p: -p, "__neg__ was called on it,"),
    "matmul": (lambda p: p @ X.t(), "__matmul__ was called on it,"),
    "indexed": (lambda p: p[0], "__getitem__ was called on it,"),
    "length": (lambda p: len(p), "__len__ was called on it,"),
    "truth": (lambda p: bool(p), "__bool__ was called on it,"),
    "equal": (lambda p: p == X, "__eq__ was called on it,"),
    "iterated": (lambda p: list(p), "__iter__ was called on it,"),
    "shape": (lambda p: p.shape, "its .shape was asked for,"),
    "method": (lambda p: p.view(-1), "its .view was asked for,"),
    "a linear layer": (lambda p: torch.nn.Linear(3, 3)(p), "it was passed to torch.nn.functional.linear,"),
    "stacked": (lambda p: torch.stack([p]), "it was passed to torch.stack,"),
    "an op": (lambda p: torch.ops.sgl_comm.all_reduce(p, "tp"), "it was passed to sgl_comm.all_reduce,"),
    "copied": (copy.copy, "__copy__ was called on it,"),
    "copied in depth": (copy.deepcopy, "__deepcopy__ was called on it,"),
    "pickled": (pickle.dumps, "__reduce_ex__ was called on it,"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_it_is_no_tensor(what: str) -> None:
    misuse, words = MISUSES[what]
    partial = PartialSum(X, "tp")
    assert not isinstance(partial, Tensor)
    with pytest.raises(SglCommError) as caught:
        misuse(partial)
    assert str(caught.value) == f"PartialSum: {words}{ADVICE}"
    assert torch.equal(take(partial, "tp", "test"), X), "a refused use must not use it up"


def test_unknown_names_are_what_python_says_they_are() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = PartialSum(X, "tp").nonsense


def test_two_of_one_group_are_summed_and_used_up() -> None:
    routed, shared = PartialSum(X, "tp"), PartialSum(2 * X, "tp")
    both = routed + shared
    assert torch.equal(take(both, "tp", "test"), 3 * X)
    for addend in (routed, shared):
        with pytest.raises(SglCommError) as caught:
            take(addend, "tp", "test")
        assert str(caught.value) == USED
        with pytest.raises(SglCommError) as caught:
            addend + PartialSum(X, "tp")
        assert str(caught.value) == USED


def test_reducing_twice_is_an_error() -> None:
    partial = PartialSum(X, "tp")
    take(partial, "tp", "test")
    with pytest.raises(SglCommError) as caught:
        take(partial, "tp", "test")
    assert str(caught.value) == USED


REFUSED_SUMS = {
    "another group": (
        PartialSum(X, "attn"),
        "got addends of the groups 'tp' and 'attn'; expected two of one group: the sums are over different ranks, so"
        " each must be reduced by itself",
    ),
    "another shape": (
        PartialSum(X[:1], "tp"),
        "got addends of (2, 3) torch.float32 and (1, 3) torch.float32; expected one shape and dtype",
    ),
    "another dtype": (
        PartialSum(X.half(), "tp"),
        "got addends of (2, 3) torch.float32 and (2, 3) torch.float16; expected one shape and dtype",
    ),
}


@pytest.mark.parametrize("what", REFUSED_SUMS)
def test_sums_of_what_does_not_fit_are_refused(what: str) -> None:
    other, words = REFUSED_SUMS[what]
    partial = PartialSum(X, "tp")
    with pytest.raises(SglCommError) as caught:
        partial + other
    assert str(caught.value) == f"PartialSum: {words}"
    assert torch.equal(take(partial, "tp", "test"), X)


def test_other_refusals() -> None:
    partial = PartialSum(X, "tp")
    with pytest.raises(SglCommError, match=r"^PartialSum: it was added to itself; expected two different addends$"):
        partial + partial
    with pytest.raises(SglCommError, match=r"^prepare_mlp: got a PartialSum of group 'tp'; expected one of group 'a'$"):
        take(partial, "a", "prepare_mlp")
    with pytest.raises(SglCommError, match=r"^PartialSum: got something of type PartialSum; expected a tensor$"):
        PartialSum(partial, "tp")  # type: ignore[arg-type]


def test_it_tells_what_it_is() -> None:
    partial = PartialSum(X, "tp")
    assert repr(partial) == "PartialSum((2, 3) torch.float32, not yet reduced over group 'tp')"
    take(partial, "tp", "test")
    assert repr(partial) == "PartialSum(used, not yet reduced over group 'tp')"
