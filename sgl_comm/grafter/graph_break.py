"""Calls out of compiled code: a break in the compiler's graph.

It is imported only when compiled code needs it: the decorator imports torch's whole compiler, which takes most of a
second and fails for a user without a name in the system's list of users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call(function: Callable[..., None], *args: Any) -> None:
    """Calls a function as plain Python, after a break in the graph."""
    function(*args)
