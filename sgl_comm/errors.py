"""The one error type that this package raises of its own, and the errors of set-up as reasons."""

from __future__ import annotations

from collections.abc import Callable


class SglCommError(RuntimeError):
    """A call that cannot be served, or a communicator that has failed.

    The text begins with the op's name and says what was got, what was expected and, for a failed communicator, which
    rank was missing. An op called through ``torch.ops`` raises the same text as a plain ``RuntimeError``.
    """


def why_not(set_up: Callable[[], object]) -> str:
    """Runs a step of ``init``. Returns what its error says, without the op's name, or an empty text."""
    try:
        set_up()
    except RuntimeError as error:
        return str(error).removeprefix("sgl_comm::init: ")
    return ""
