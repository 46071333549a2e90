"""All-reduce between GPUs of one host by pushing into the peers' workspaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm import _library, envs
from sgl_comm import ops as sgl_ops
from sgl_comm.capability import SUPPORTED_DTYPES, why_not_world_size
from sgl_comm.rendezvous import Rendezvous

_ops = torch.ops.sgl_comm

MIN_MAX_SIZE = 64 << 10
"""Bytes: one block's places in the ring."""


def _bad_max_size(max_size: int | None) -> str:
    """What is wrong with it, or an empty text."""
    if max_size is None or (max_size >= MIN_MAX_SIZE and max_size % 16 == 0):
        return ""
    return f"got max_size {max_size}; expected a multiple of 16 bytes, at least {MIN_MAX_SIZE}"


class CustomAllReduceV2:
    """Owns a group's place in the CUDA registry and, where the kernels can serve it, this rank's workspace.

    The workspace is one ``cudaMalloc`` of 2 * world * max_size bytes and a little, shared by CUDA IPC and opened by
    each peer once. The user's own tensors are never shared.

    Args:
        group: the ranks, or None for the default group. Making one is a collective call.
        device: this rank's GPU. Several ranks may share one.
        max_size: bytes of the largest message that goes in one launch without the ring, a multiple of 16, at least
            65536; None for 4 MiB (world 8: 64 MiB a rank). Alike on all ranks. Bounds the workspace alone.

    Raises:
        SglCommError: the group already has a communicator, or a bad max_size.
    """

    def __init__(
        self, group: ProcessGroup | None, device: torch.device | str | int, max_size: int | None = None
    ) -> None:
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        link = Rendezvous.of(group, self.device)
        self.group_name = link.name
        self._registered = False
        problem = _bad_max_size(max_size) or self._try_to_open(link)
        try:
            link.refuse_together(problem)
            alone = link.world == 1  # served without a workspace
            self.reason = link.agree(_library.cuda_missing) or why_not_world_size(link.world)
            if not self.reason and not alone:
                self.reason = self._set_up(link, max_size)
            if self._registered:
                _ops._v2_settle(link.name, not self.reason and not alone)
        except BaseException:
            self.close()
            raise
        self.disabled = bool(self.reason)

    def _try_to_open(self, link: Rendezvous) -> str:
        """Registers the group with the CUDA library, if there is one. Returns why this rank cannot, or ""."""
        try:
            envs.timeout_seconds()
            if not _library.cuda_missing:
                _ops._cuda_group_open(link.name, link.rank, link.world)
                self._registered = True
        except RuntimeError as error:
            return str(error).removeprefix("sgl_comm::init: ")
        return ""

    def _set_up(self, link: Rendezvous, max_size: int | None) -> str:
        """Makes and shares the workspace. Returns why it cannot be used, the same on every rank; empty if it can."""
        mine = _ops._v2_publish(link.name, self.device.index, max_size or 0, envs.timeout_seconds())
        return link.agree(_ops._v2_attach(link.name, link.all_gather(mine)))

    def should_custom_ar(self, input: Tensor) -> bool:
        """Whether the kernels serve this tensor; its size does not matter."""
        return not self.disabled and input.device == self.device and input.dtype in SUPPORTED_DTYPES

    def custom_all_reduce(self, input: Tensor) -> Tensor | None:
        """The sum of every rank's input as a new tensor, or None where ``should_custom_ar`` is False."""
        return sgl_ops.custom_all_reduce_v2(input, self.group_name) if self.should_custom_ar(input) else None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Nothing needs registering: the kernels touch no memory of the user's at a peer."""
        yield

    def fault(self) -> str:
        """Why the communicator has become unusable; empty while it is not. Does not wait for the GPU."""
        return _ops._v2_fault(self.group_name) if self._registered else ""

    def close(self) -> None:
        """Waits for this rank's kernels and gives the workspace up; a peer that still calls gets an error in time.

        A CUDA graph that holds calls of this communicator must not be replayed afterwards: its memory is gone.
        """
        if self._registered:
            self._registered = False
            _ops._cuda_group_close(self.group_name)
