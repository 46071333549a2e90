"""The communication inside a model layer: custom all-reduce on CPU and CUDA, as ``torch.ops.sgl_comm``."""

from __future__ import annotations

# isort: off
from sgl_comm import _library  # noqa: F401  (first: it says what is wrong with this copy, or with the torch at hand)

# isort: on
from sgl_comm import _build_notes, envs, ops
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.dispatch import can_use_custom_all_reduce_v2, dispatch_custom_allreduce
from sgl_comm.backends.shm_all_reduce import ShmAllReduce
from sgl_comm.build_info import BuildInfo, build_info
from sgl_comm.cfg_group import CfgGroup
from sgl_comm.communicator import Communicator, init
from sgl_comm.errors import SglCommError
from sgl_comm.work import Work

__version__ = "0.1.0"
__all__ = [
    "BuildInfo",
    "CfgGroup",
    "Communicator",
    "CustomAllReduceV1",
    "CustomAllReduceV2",
    "SglCommError",
    "ShmAllReduce",
    "Work",
    "build_info",
    "can_use_custom_all_reduce_v2",
    "dispatch_custom_allreduce",
    "init",
    "ops",
]

envs.warn_about_names()
_build_notes.tell()
