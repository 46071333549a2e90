"""What compiled code calls to leave the compiler.

A module of its own, imported at that moment: the decorator imports torch's whole compiler, which takes most of a second
and fails for a user without a name in the system's list of users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sgl_comm.grafter.grafter import Grafter


@torch.compiler.disable
def intercept(grafter: Grafter, *args: Any) -> None:
    """``Grafter.maybe_intercept`` as plain Python, after a break in the graph."""
    grafter._intercept(*args)
