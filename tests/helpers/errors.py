"""What a call that fails says."""

from __future__ import annotations

from collections.abc import Callable

import sgl_comm


def error_text(call: Callable[[], object]) -> str:
    """The text of a call's ``SglCommError``, or an empty one."""
    try:
        call()
    except sgl_comm.SglCommError as error:
        return str(error)
    return ""


def error_with_type(call: Callable[[], object]) -> str:
    """The type and text of a call's error, of any type, or that there was none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
