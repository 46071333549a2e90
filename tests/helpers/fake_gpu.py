"""Fake GPUs, for what is chosen without asking one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor

from sgl_comm import _library
from sgl_comm.backends import capability
from sgl_comm.backends.capability import Survey
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.gpu_all_reduce import GpuAllReduce
from sgl_comm.backends.rendezvous import Rendezvous

GPU = torch.device("cuda", 0)

NO_NVLINK = "no NVLink between the GPUs of rank 0 and rank 1; `nvidia-smi topo -m` shows which GPUs have it"
NO_ACCESS = "no peer access between the GPUs of rank 0 and rank 1; an IOMMU may keep it off"
SURVEYS = {
    "v2": Survey("", ""),
    "v1": Survey(NO_NVLINK, ""),
    "gloo": Survey(NO_ACCESS, NO_ACCESS),
    "gloo, two reasons": Survey(NO_NVLINK, NO_ACCESS),
}


@dataclass(frozen=True)
class Described:
    """What of a tensor is looked at to choose; no GPU is needed for it."""

    device: torch.device
    dtype: torch.dtype
    nbytes: int


def on_gpu(dtype: torch.dtype, nbytes: int, device: torch.device = GPU) -> Tensor:
    return cast(Tensor, Described(device, dtype, nbytes))


@contextmanager
def fake_gpu(found: Survey, backend: str = "") -> Iterator[None]:
    """Fakes a GPU, what a survey of the group finds, and set-up, which succeeds.

    There is no kernel for it. ``backend``: what the process group is said to use.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "cuda_missing", "there is none, for this test")
        patch.setattr(capability, "survey", lambda link, device: found)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(GpuAllReduce, "_set_up", lambda self, link, max_size: "")
        patch.setattr(CustomAllReduceV2, "algorithm", lambda self, num_bytes: "one_shot")
        if backend:
            patch.setattr(Rendezvous, "backend_for", lambda self, device_type: backend)
        yield
