"""All-reduce between GPUs of one host by pushing into the peers' workspaces."""

from __future__ import annotations

import torch

from sgl_comm.backends.gpu_all_reduce import MIN_MAX_SIZE, GpuAllReduce

_ops = torch.ops.sgl_comm

_BUFFERS = 3
_MOST_MAX_SIZE = 8 << 20
_MOST_IN_BUFFERS = (52 << 20) - (4608 << 10)
"""Bytes of a rank by default; with what broadcasts and control words take this makes 52 MiB, and 66 MiB with V1's."""


def default_max_size(world: int) -> int:
    """Bytes: 8 MiB, or as much less as keeps the workspace at 52 MiB (world 8: 2.25 MiB)."""
    fitting = _MOST_IN_BUFFERS // (_BUFFERS * (world - 1)) // MIN_MAX_SIZE * MIN_MAX_SIZE
    return min(_MOST_MAX_SIZE, fitting)


class CustomAllReduceV2(GpuAllReduce):
    """Push. Owns, where the kernels can serve the group, this rank's workspace.

    The workspace is one ``cudaMalloc`` of 3 * (world - 1) * max_size bytes and 4.5 MiB at most for broadcasts and
    control words, rounded up to 2 MiB, shared by CUDA IPC and opened by each peer once. The user's own tensors are
    never shared. ``max_size`` bounds the workspace alone: larger messages pass through it in pieces. By default it is 8
    MiB, or less from three ranks on (at most 52 MiB a rank).

    The arguments and errors are those of ``GpuAllReduce``.
    """

    version = "v2"
    protocol = "push"

    def _default_max_size(self, world: int) -> int:
        return default_max_size(world)

    def algorithm(self, num_bytes: int) -> str:
        """By which algorithm a message of so many bytes goes."""
        return _ops._cuda_algorithm(self.group_name, num_bytes)
