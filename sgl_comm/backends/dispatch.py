"""Which all-reduce serves a group on its devices. Collective calls: every rank of the group makes them, all agree."""

from __future__ import annotations

import logging

import torch
from torch.distributed import ProcessGroup

from sgl_comm.backends import capability, thresholds
from sgl_comm.backends.capability import Survey, as_device
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.backends.shm_all_reduce import ShmAllReduce

logger = logging.getLogger(__name__)

_logged: set[str] = set()


def can_use_custom_all_reduce_v2(group: ProcessGroup | None, device: torch.device | str | int) -> bool:
    """Whether the push kernels can serve the group: one host, NVLink between all GPUs, and data really passes.

    Args:
        group: the ranks, or None for the default group.
        device: this rank's GPU; False for the CPU.

    Raises:
        SglCommError: no such group, or ranks that name different types of device.
    """
    rendezvous, device = _agreed("can_use_custom_all_reduce_v2", group, device)
    return device.type == "cuda" and not capability.survey(rendezvous, device).v2


def dispatch_custom_allreduce(group: ProcessGroup | None, device: torch.device | str | int) -> type:
    """The class that serves the group best, alike on all ranks; make it with (group, device).

    Args:
        group: the ranks, or None for the default group.
        device: this rank's GPU, or the CPU.

    Returns:
        ``ShmAllReduce`` for the CPU; for GPUs ``CustomAllReduceV2`` where it can serve, else ``CustomAllReduceV1``.
        Where neither can, too, it is ``CustomAllReduceV1``, which then comes up ``disabled`` and says why.

    Raises:
        SglCommError: no such group, or ranks that name different types of device.
    """
    rendezvous, device = _agreed("dispatch_custom_allreduce", group, device)
    if device.type != "cuda":
        return ShmAllReduce
    found = capability.survey(rendezvous, device)
    _log(rendezvous, device, found)
    return CustomAllReduceV1 if found.v2 else CustomAllReduceV2


def _agreed(op: str, group: ProcessGroup | None, device: torch.device | str | int) -> tuple[Rendezvous, torch.device]:
    thresholds._maybe_init_config()
    device = as_device(device)
    rendezvous = Rendezvous.of(group, device)
    wrong = "" if device.type in ("cpu", "cuda") else f"got device {str(device)!r}; expected the CPU or a CUDA device"
    rendezvous.refuse_together(wrong, op)
    rendezvous.must_be_alike("devices", device.type, op)
    return rendezvous, device


def _log(rendezvous: Rendezvous, device: torch.device, found: Survey) -> None:
    """One line a process for each choice: what serves, and why not something better."""
    if not found.v2:
        level, said = logging.INFO, "CustomAllReduceV2"
    elif not found.v1:
        level, said = logging.WARNING, f"CustomAllReduceV1, since V2 cannot: {found.v2}"
    else:
        level, said = logging.WARNING, f"{rendezvous.backend_for(device.type)}, since V2 cannot: {found.v2}"
        said += "" if found.v1 == found.v2 else f"; V1 cannot: {found.v1}"
    line = (
        f"sgl_comm: group {rendezvous.name!r}, rank {rendezvous.rank} of {rendezvous.world}, {device}: served by {said}"
    )
    if line not in _logged:
        _logged.add(line)
        logger.log(level, "%s", line)
