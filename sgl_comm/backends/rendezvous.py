"""Exchange of small things among a group's ranks, at set-up alone: bytes as tensors, over the caller's own group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import get_backend_config

from sgl_comm.errors import SglCommError

_TEXT_BYTES = 512


@dataclass(frozen=True)
class Rendezvous:
    """A group of ranks and this process's rank in it."""

    group: ProcessGroup
    name: str
    rank: int
    world: int
    device: torch.device
    """Where a group without a CPU backend wants its tensors."""

    @staticmethod
    def of(group: ProcessGroup | None, device: torch.device | None = None) -> Rendezvous:
        """The given group, or the default one; ``device`` is this rank's GPU, None for the current one.

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
        cpu = torch.device("cpu")
        if cpu in getattr(group, "_device_types", [cpu]):
            device = cpu
        elif device is None or device.type != "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return Rendezvous(group, group.group_name, dist.get_rank(group), dist.get_world_size(group), device)

    def backend_for(self, device_type: str) -> str:
        """The group's own backend for tensors of this type of device: "gloo", "nccl", ...; "none" if it has none."""
        pairs = dict(part.partition(":")[::2] for part in str(get_backend_config(self.group)).split(","))
        return pairs.get(device_type, "none") or str(dist.get_backend(self.group))

    @staticmethod
    def again(group: Callable[[], ProcessGroup | None], device: torch.device, op: str) -> Rendezvous:
        """The same group later on, by a weak reference to it.

        Raises:
            SglCommError: the group is gone.
        """
        held = group()
        if held is None:
            raise SglCommError(f"{op}: the group is gone; expected it to live as long as its communicator")
        return Rendezvous.of(held, device)

    def all_gather(self, mine: Tensor) -> Tensor:
        """Every rank's 1-D uint8 tensor of one length, one after the other in rank order, on the CPU."""
        if self.world == 1:
            return mine
        pieces = [torch.empty_like(mine, device=self.device) for _ in range(self.world)]
        dist.all_gather(pieces, mine.to(self.device), group=self.group)
        return torch.cat(pieces).cpu()

    def refuse_together(self, problem: str, op: str = "init") -> None:
        """Raises ``SglCommError`` on every rank if any rank has a problem ("" where it has none)."""
        said = self.agree(problem)
        if said:
            raise SglCommError(f"{op}: {problem or said}")

    def must_be_alike(self, what: str, text: str, op: str = "init") -> None:
        """Raises ``SglCommError`` on every rank if ``text`` differs between them; ``what`` names it in the error."""
        theirs = self.texts(text)
        if len(set(theirs)) > 1:
            raise SglCommError(f"{op}: got {what} {', '.join(theirs)} on ranks 0 to {self.world - 1}; expected one")

    def agree(self, reason: str) -> str:
        """Tells all ranks why this one cannot go on ("" if it can). Returns the first rank's reason, alike on all."""
        return next((f"rank {rank}: {text}" for rank, text in enumerate(self.texts(reason)) if text), "")

    def texts(self, text: str) -> list[str]:
        """Every rank's text, in rank order; each is cut after 512 bytes."""
        mine = torch.tensor(
            list(text.encode(errors="replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8
        )
        rows = self.all_gather(mine).view(self.world, _TEXT_BYTES)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


@contextmanager
def shared_status(rendezvous: Rendezvous, op: str) -> Iterator[None]:
    """A stretch of code on all ranks whose end is collective: an error on one rank is an error on all.

    Raises:
        SglCommError: another rank raised an error in it. The rank itself raises its own.
    """
    problem = ""
    try:
        yield
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        said = rendezvous.agree(problem)
        if said and not problem:
            raise SglCommError(f"{op}: {said}")
