"""All-reduce between GPUs of one host by reading the peers' inputs through peer pointers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sgl_comm import ops as sgl_ops
from sgl_comm.backends.gpu_all_reduce import GpuAllReduce
from sgl_comm.backends.rendezvous import Rendezvous, shared_status
from sgl_comm.errors import SglCommError

_ops = torch.ops.sgl_comm

DEFAULT_MAX_SIZE = 8 << 20


class CustomAllReduceV1(GpuAllReduce):
    """Pull. Needs peer access alone, so it serves GPUs without NVLink too.

    Owns a workspace of flags, a staging area of ``max_size`` bytes (8 MiB by default) and an area for sums of
    ``max_size / world``: one ``cudaMalloc`` of at most 14 MiB a rank by default, shared by CUDA IPC; and from the first
    ``capture()`` on a table of 4 MiB. An eager call copies its input to the staging area, in pieces if it is larger.
    Inside ``capture()`` a captured call's input is read where it lies: when the ranks leave it they exchange addresses,
    and a graph may be replayed from then on. Memory that cannot be shared (expandable segments, ``cudaMallocAsync``),
    inputs that are not 16-byte aligned or not a multiple of 16 bytes, in-place calls, and calls captured outside
    ``capture()`` are copied, as eager ones are.

    The arguments and errors are those of ``GpuAllReduce``.
    """

    version = "v1"
    protocol = "pull"

    def _default_max_size(self, world: int) -> int:
        return DEFAULT_MAX_SIZE

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the capture of CUDA graphs; warm-up calls inside it are eager calls. Collective.

        Leaving it exchanges, in this order: whether every rank is well, how many calls each has captured, and where
        their inputs lie. A graph replayed before that, or after an error here, fails softly: NaN, and an error at the
        next call.

        Raises:
            SglCommError: another rank raised an error inside it, the ranks captured different calls, or a rank cannot
                reach an input of another's; the same on every rank.
        """
        rendezvous = self._rendezvous("capture")
        if self.disabled or rendezvous.world == 1:
            with shared_status(rendezvous, "capture"):
                yield
            return
        with shared_status(rendezvous, "capture"):
            with sgl_ops.own_errors():
                _ops._cuda_begin_capture(self.group_name)
            try:
                yield
            finally:
                with sgl_ops.own_errors():
                    mine = _ops._cuda_end_capture(self.group_name)
        self._register(rendezvous, mine)

    def _register(self, rendezvous: Rendezvous, mine: Tensor) -> None:
        counts = rendezvous.all_gather(torch.tensor([mine.numel()]).view(torch.uint8)).view(torch.int64).tolist()
        if len(set(counts)) > 1:
            got = f"{counts} bytes of captured calls on ranks 0 to {rendezvous.world - 1}"
            raise SglCommError(f"capture: got {got}; expected the same calls on every rank")
        if mine.numel() == 0:
            return
        handles = rendezvous.all_gather(mine)
        try:
            problem = _ops._cuda_register_inputs(self.group_name, handles)
        except RuntimeError as error:
            problem = str(error)
        said = rendezvous.agree(problem)
        if said:
            raise SglCommError(f"capture: {said}")

    def open_mappings(self) -> dict[str, int]:
        """How many allocations of peers are mapped here now, were ever, were closed; and captured calls held."""
        names = ("open", "opened", "closed", "calls")
        return dict(zip(names, _ops._cuda_mapping_counts(self.group_name), strict=True))
