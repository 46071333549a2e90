"""The all-reduces that the benchmark compares: one class each, with the same three methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Contender:
    """An all-reduce to be timed.

    ``setup(x, num_buffers)`` makes that many copies of ``x`` to work on, in memory that suits; each ``run()`` sums the
    next of them over the ranks and returns the result; ``close()`` gives the memory back. ``exact`` says whether the
    result must have the bits of ``sgl_comm.reference``, or need only be near it.
    """

    name = ""
    exact = False

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def setup(self, x: torch.Tensor, num_buffers: int) -> None:
        self.buffers = [x.clone() for _ in range(num_buffers)]
        self.turns = itertools.cycle(self.buffers)

    def run(self) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        self.buffers = []
        self.turns = itertools.cycle(self.buffers)


class SglComm(Contender):
    """``torch.ops.sgl_comm.all_reduce_``, or the functional form."""

    exact = True

    def __init__(self, group_name: str, in_place: bool) -> None:
        super().__init__()
        self.name, self.group_name, self.in_place = "sgl_comm", group_name, in_place
        self.mutate = torch.ops.sgl_comm.all_reduce_.default
        self.make = torch.ops.sgl_comm.all_reduce.default

    def run(self) -> torch.Tensor:
        x = next(self.turns)
        if not self.in_place:
            return self.make(x, self.group_name)
        self.mutate(x, self.group_name)
        return x


class Algorithm(Contender):
    """One algorithm of ``torch.ops.sgl_comm.custom_all_reduce_v2``, which is always out of place."""

    exact = True

    def __init__(self, algorithm: str, group_name: str) -> None:
        super().__init__()
        self.name, self.group_name = algorithm, group_name

    def run(self) -> torch.Tensor:
        return torch.ops.sgl_comm.custom_all_reduce_v2(next(self.turns), self.group_name, self.name)


class ProcessGroup(Contender):
    """``dist.all_reduce`` of a gloo or NCCL group. It has in-place calls only: out of place is a copy and a call."""

    def __init__(self, name: str, group: dist.ProcessGroup, in_place: bool) -> None:
        super().__init__()
        self.name, self.group, self.in_place = name, group, in_place

    def run(self) -> torch.Tensor:
        x = next(self.turns)
        if not self.in_place:
            x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x


class SymmetricNccl(ProcessGroup):
    """``dist.all_reduce`` of an NCCL group on buffers that it knows as a symmetric window, for which it has kernels."""

    pool: torch.cuda.MemPool | None = None

    def setup(self, x: torch.Tensor, num_buffers: int) -> None:
        self.close()
        dist.all_reduce(x.new_zeros(1), group=self.group)  # makes the group's communicator, if there is none yet
        self.backend = self.group._get_backend(x.device)
        pool = torch.cuda.MemPool(self.backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool, x.device):
            window = torch.empty((num_buffers, *x.shape), dtype=x.dtype, device=x.device)
        self.backend.register_mem_pool(pool, symm=True)
        self.pool = pool
        self.buffers = list(window.copy_(x.expand_as(window)))
        self.turns = itertools.cycle(self.buffers)

    def close(self) -> None:
        super().close()
        if self.pool is not None:
            self.backend.deregister_mem_pool(self.pool)
            self.pool = None


class SymmetricMemory(Contender):
    """torch's symmetric-memory all-reduce, ``algorithm`` one_shot (out of place by nature) or two_shot (in place).

    Where the benchmark wants the other form, a copy is added: users would pay for it too.
    """

    def __init__(self, algorithm: str, group: dist.ProcessGroup, in_place: bool) -> None:
        super().__init__()
        self.name, self.one_shot, self.in_place = f"symm_mem {algorithm}", algorithm == "one_shot", in_place
        self.group_name = group.group_name

    def setup(self, x: torch.Tensor, num_buffers: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.buffers = []
        for _ in range(num_buffers):
            buffer = symmetric_memory.empty(x.shape, dtype=x.dtype, device=x.device)
            symmetric_memory.rendezvous(buffer, self.group_name)
            self.buffers.append(buffer.copy_(x))
        self.turns = itertools.cycle(self.buffers)

    def run(self) -> torch.Tensor:
        x = next(self.turns)
        if self.one_shot:
            y = torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self.group_name)
            return x.copy_(y) if self.in_place else y
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group_name)
        return x if self.in_place else x.clone()


def contenders(
    group: dist.ProcessGroup, group_name: str, device: torch.device, in_place: bool, algorithms: Sequence[str] = ()
) -> list[Contender]:
    """sgl_comm and its competitors on this device. A collective call: a GPU group may need an NCCL group made.

    Args:
        group: the ranks; its CPU backend is gloo.
        group_name: the name under which ``sgl_comm`` knows them.
        device: this rank's device.
        in_place: which form of each to use.
        algorithms: those of the push kernels that are to take part by themselves.
    """
    everyone: list[Contender] = [SglComm(group_name, in_place)]
    everyone += [Algorithm(algorithm, group_name) for algorithm in algorithms]
    theirs = peer_group(group, device)
    if theirs is None:
        return everyone
    everyone.append(ProcessGroup(*theirs, in_place))
    if device.type == "cuda":
        everyone.append(SymmetricNccl("nccl_symmetric", theirs[1], in_place))
        everyone += [SymmetricMemory(algorithm, theirs[1], in_place) for algorithm in ("one_shot", "two_shot")]
    return everyone


def peer_group(group: dist.ProcessGroup, device: torch.device) -> tuple[str, dist.ProcessGroup] | None:
    """What torch itself has for tensors of this device, with its name: gloo, or an NCCL group made here (collective).

    None where ranks share a GPU, which neither NCCL nor symmetric memory can.
    """
    if device.type == "cpu":
        return "gloo", group
    if group.size() > torch.cuda.device_count():
        return None
    return "nccl", dist.new_group(dist.get_process_group_ranks(group), backend="nccl")
