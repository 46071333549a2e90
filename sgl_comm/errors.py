"""The one error type that this package raises of its own."""

from __future__ import annotations


class SglCommError(RuntimeError):
    """A call that cannot be served, or a communicator that has failed.

    The text begins with the op's name and says what was got, what was expected and, for a failed communicator, which
    rank was missing. An op called through ``torch.ops`` raises the same text as a plain ``RuntimeError``.
    """
