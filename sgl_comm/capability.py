"""What the package's own kernels can serve; all else is the fallback's."""

from __future__ import annotations

import torch

SUPPORTED_WORLD_SIZES = range(1, 9)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_world_size(world: int) -> str:
    """Why no kernel serves a group of this size; empty if one does."""
    if world in SUPPORTED_WORLD_SIZES:
        return ""
    return f"world size {world} is not one of {SUPPORTED_WORLD_SIZES[0]} to {SUPPORTED_WORLD_SIZES[-1]}"
