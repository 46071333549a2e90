"""A failing comparison says what was compared, and is shown in the test that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.calls import AllReduce, CfgBroadcast, run_calls
from helpers.compare import Compared, assert_none_wrong, difference, differences
from helpers.ranks import Ranks
from sgl_comm import reference, testing
from sgl_comm.testing import RankContext

NAN, OTHER_NAN = (torch.tensor([word], dtype=torch.int32).view(torch.float32) for word in (0x7FC00000, 0x7FC00001))


def wrong_sum(ctx: RankContext) -> list[str]:
    """A sum whose oracle has been made wrong on rank 1 in one element."""
    values = [torch.tensor([[0.5, 1.5], [2.5, 3.5]]), torch.tensor([[0.25, 1.25], [2.25, -0.0]])]
    call = AllReduce("bfloat16 of two ranks", values, [testing.layouts((2, 2))["transposed"]] * 2, "0", ctx.rank)
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == 1:
            patch.setattr(reference, "all_reduce", lambda every: sum(every) + torch.tensor([[0, 0], [1.0, 0]]))
        return run_calls(ctx, [call])


def test_it_shows_the_call_the_element_both_values_and_what_the_ranks_put_in() -> None:
    with pytest.raises(AssertionError) as caught:
        Ranks("cpu", 2).all_right(wrong_sum)
    assert str(caught.value) == (
        "1 wrong, among them:\n"
        "rank 1: bfloat16 of two ranks, result: 1 of 4 elements differ, first at [1, 0]: got 4.75 (bits 0x40980000),"
        " expected 5.75 (bits 0x40b80000); the ranks put in 2.5, 2.25"
    )
    shown = caught.traceback.filter(caught)[-1]
    assert Path(shown.path) == Path(__file__), "pytest shows the helper's lines and not the test's"


def test_equal_tensors_differ_in_nothing() -> None:
    x = torch.tensor([1.0, -0.0, float("nan")])
    assert difference(x, x.clone(), "equal") == []
    assert difference(NAN, OTHER_NAN, "a sum") == []
    assert differences([Compared("strides", x.view(3, 1).t(), x.view(1, 3), strides=(3, 1))]) == [
        "strides: got strides (1, 1), expected (3, 1)"
    ]
    assert_none_wrong([[], []])


@pytest.mark.parametrize(
    ("got", "expected", "text"),
    [
        (
            torch.zeros(2),
            -torch.zeros(2),
            "a label: 2 of 2 elements differ, first at [0]: got 0.0 (bits 0x00000000)",
        ),
        (torch.zeros(2), torch.zeros(3), "a label: got torch.float32 (2,), expected torch.float32 (3,)"),
        (torch.zeros(2), torch.zeros(2).half(), "a label: got torch.float32 (2,), expected torch.float16 (2,)"),
    ],
    ids=["signs of zero", "shape", "dtype"],
)
def test_what_differs_is_said(got: torch.Tensor, expected: torch.Tensor, text: str) -> None:
    (found,) = difference(got, expected, "a label")
    assert found.startswith(text)


def test_moves_must_keep_the_payload_of_nan() -> None:
    assert CfgBroadcast.exact
    assert difference(NAN, OTHER_NAN, "a move", exact=True) == [
        "a move, as words: 1 of 1 elements differ, first at [0]: got 2143289344 (bits 0x7fc00000), expected 2143289345"
        " (bits 0x7fc00001)"
    ]


def test_of_many_failures_the_first_are_shown() -> None:
    wrong = differences(Compared(f"number {i}", torch.ones(1), torch.full((1,), 1.0 + i)) for i in range(9))
    assert [text.partition(":")[0] for text in wrong] == [*(f"number {i}" for i in range(1, 6)), "and 3 more"]
