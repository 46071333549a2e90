"""Exchange of small things among a group's ranks, at set-up alone: bytes as tensors, over the caller's own group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sgl_comm.errors import SglCommError

_REASON_BYTES = 512


@dataclass(frozen=True)
class Rendezvous:
    """A group of ranks and this process's place in it."""

    group: ProcessGroup
    name: str
    rank: int
    world: int

    @staticmethod
    def of(group: ProcessGroup | None) -> Rendezvous:
        """The given group, or the default one.

        Raises:
            SglCommError: no default group, or a group that this process is not in.
        """
        if group is None:
            if not dist.is_initialized():
                raise SglCommError(
                    "init: got no group and there is no default one; expected torch.distributed.init_process_group"
                    " to have been called, or a group to be given"
                )
            group = dist.group.WORLD
        if group is None or group is dist.GroupMember.NON_GROUP_MEMBER:
            raise SglCommError("init: got a group that this process is not in; expected a group of its own")
        return Rendezvous(group, group.group_name, dist.get_rank(group), dist.get_world_size(group))

    @property
    def backend(self) -> str:
        """The group's own backend: "gloo", "nccl", ..."""
        return str(dist.get_backend(self.group))

    def all_gather(self, mine: Tensor) -> Tensor:
        """Every rank's 1-D uint8 tensor of one length, one after the other in rank order, on the CPU."""
        if self.world == 1:
            return mine
        on_cpu = torch.device("cpu") in getattr(self.group, "_device_types", [torch.device("cpu")])
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        pieces = [torch.empty_like(mine, device=device) for _ in range(self.world)]
        dist.all_gather(pieces, mine.to(device), group=self.group)
        return torch.cat(pieces).cpu()

    def refuse_together(self, problem: str) -> None:
        """Raises ``SglCommError`` on every rank if any rank has a problem ("" where it has none)."""
        said = self.agree(problem)
        if said:
            raise SglCommError(f"init: {problem or said}")

    def agree(self, reason: str) -> str:
        """Tells all ranks why this one cannot go on ("" if it can). Returns the first rank's reason, alike on all."""
        text = reason.encode()[:_REASON_BYTES]
        mine = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
        if text:
            mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        for rank, theirs in enumerate(self.all_gather(mine).view(self.world, -1)):
            if theirs[0] != 0:
                said = bytes(theirs.tolist()).rstrip(b"\0").decode(errors="replace")
                return f"rank {rank}: {said}"
        return ""
