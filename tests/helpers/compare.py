"""Comparisons: got against expected, bit for bit, in words that say which tensor of which call is wrong, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_comm import testing

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Compared:
    """A tensor, what it must be, and what a failure calls it.

    ``exact``: NaN must keep its payload, as where nothing is summed; the failure then shows the tensors' words.
    ``strides``: those it must have; unless given, any will do.
    ``inputs``: what each rank put in, of the expected shape; the failure shows those of the first wrong element.
    """

    label: str
    got: Tensor
    expected: Tensor
    exact: bool = False
    strides: Sequence[int] | None = None
    inputs: Sequence[Tensor] = ()

    def comparable(self) -> bool:
        return self.got.dtype == self.expected.dtype and self.got.shape == self.expected.shape


def difference(got: Tensor, expected: Tensor, label: str, exact: bool = False) -> list[str]:
    """What is wrong with one tensor, if anything; see `Compared`."""
    return differences([Compared(label, got, expected, exact)])


def differences(compared: Iterable[Compared], most: int = 5) -> list[str]:
    """What is wrong with the first ``most`` wrong ones, after one look at the device for all of them."""
    wrong: list[str] = []
    suspects: list[tuple[Compared, Tensor]] = []
    for each in compared:
        if not each.comparable():
            got, expected = (f"{x.dtype} {tuple(x.shape)}" for x in (each.got, each.expected))
            wrong.append(f"{each.label}: got {got}, expected {expected}")
            continue
        if each.strides is not None and each.got.stride() != tuple(each.strides):
            wrong.append(f"{each.label}: got strides {each.got.stride()}, expected {tuple(each.strides)}")
        if not _same_bits_on_cpu(each):
            suspects.append((each, _wrong_elements(each).any()))
    found = torch.stack([flag for _, flag in suspects]).tolist() if suspects else []
    failed = [each for (each, _), is_wrong in zip(suspects, found, strict=True) if is_wrong]
    wrong += [_explained(each) for each in failed[:most]]
    return wrong + ([f"and {len(failed) - most} more"] if len(failed) > most else [])


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor."""
    return torch.empty(tuple(shape), device="meta").stride()


def as_words(x: Tensor) -> Tensor:
    """The bits of a tensor's elements in row-major order, as integers, which tell one NaN from another."""
    flat = x.contiguous().as_strided((x.numel(),), (1,))  # a view as words minds the stride of a single element too
    return flat.view(_WORDS.get(x.element_size(), torch.uint8))


def owners(out: Tensor, others: Sequence[Tensor]) -> int:
    """How many of the others lie in the same storage."""
    storage = out.untyped_storage().data_ptr()
    return sum(other.untyped_storage().data_ptr() == storage for other in others)


def assert_none_wrong(results: Sequence[Sequence[str]]) -> None:
    """For functions that give what is wrong on their rank: fails, in the test that calls this, with the first of it."""
    __tracebackhide__ = True
    wrong = [f"rank {rank}: {text}" for rank, found in enumerate(results) for text in found]
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong, among them:\n" + "\n".join(wrong[:20]))


def _same_bits_on_cpu(each: Compared) -> bool:
    """Whether there is nothing to look into: quick, and on a GPU it would wait."""
    words = _WORDS.get(each.got.element_size())
    if words is None or each.got.device.type != "cpu" or each.expected.device.type != "cpu":
        return False
    return torch.equal(each.got.view(words), each.expected.view(words))


def _wrong_elements(each: Compared) -> Tensor:
    if each.exact:
        return as_words(each.got) != as_words(each.expected).to(each.got.device)
    return testing.wrong_elements(each.got, each.expected)


def _explained(each: Compared) -> str:
    got, expected = each.got.cpu(), each.expected.cpu()
    label = each.label
    if each.exact:
        got, expected, label = as_words(got), as_words(expected), f"{label}, as words"
    try:
        testing.assert_bits_equal(got, expected, label)
    except AssertionError as error:
        return f"{error}{_inputs_at_first(each)}"
    raise RuntimeError(f"{label}: differs on {each.got.device}, but not on the CPU")


def _inputs_at_first(each: Compared) -> str:
    if not each.inputs:
        return ""
    first = tuple(_wrong_elements(each).cpu().view(each.got.shape).nonzero()[0].tolist())
    return f"; the ranks put in {', '.join(repr(x[first].item()) for x in each.inputs)}"
