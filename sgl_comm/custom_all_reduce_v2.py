"""All-reduce between GPUs by pushing into the peers' workspaces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class CustomAllReduceV2:
    def __init__(self, group: ProcessGroup | None, device: torch.device, max_size: int | None = None, host=None) -> None:
        self.disabled = True
        self.reason = "not yet"

    def fault(self) -> str:
        return ""

    def close(self) -> None: ...
