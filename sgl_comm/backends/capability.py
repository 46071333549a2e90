"""What the package's own kernels can serve: dtypes, world sizes, hosts, peer access. The rest is the fallback's.

What a rank can find out of itself and its GPU are small functions; ``survey`` asks them on every rank and gives the
group's verdict. Nothing here reads CUDA_VISIBLE_DEVICES: devices are told apart by the UUID that the driver gives.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from pathlib import Path

import torch

from sgl_comm import _library
from sgl_comm.backends import transfer_check
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.backends.thresholds import supported_world_sizes

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PeerAccess(Enum):
    """How one GPU reaches another, as one process sees it; the value is what ranks send each other."""

    SAME = "="
    """The same device."""
    NVLINK = "N"
    PEER = "P"
    """Peer access without NVPeerAccess."""
    NONE = "0"
    UNSEEN = "?"
    """That GPU is not visible in this process. CUDA IPC may work all the same: the transfer check decides."""


@dataclass(frozen=True)
class Survey:
    """Why V2 and V1 cannot serve a group, alike on all its ranks; each text empty where it can."""

    v2: str
    v1: str


def as_device(device: torch.device | str | int) -> torch.device:
    """A device in any of the ways in which a caller may give it; a number is a GPU's."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def why_not_world_size(world: int) -> str:
    """Why no kernel serves a group of this size; empty if one does."""
    worlds = (1, *supported_world_sizes())
    return "" if world in worlds else f"world size {world} is not one of {worlds[0]} to {worlds[-1]}"


def host_id() -> str:
    """What tells this host from others and is alike in all its containers: the boot's id, else the host's name."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def device_uuid(device: torch.device | int) -> str:
    """The UUID of a GPU, or of a part of one (MIG), as the driver gives it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def peer_access(device: torch.device, uuids: Sequence[str]) -> list[PeerAccess]:
    """How ``device`` reaches each of the devices with these UUIDs, as seen from this process."""
    own = device.index if device.index is not None else torch.cuda.current_device()
    visible = {device_uuid(index): index for index in range(torch.cuda.device_count())}
    return [_access_to(own, device_uuid(own), visible, uuid) for uuid in uuids]


def survey(rendezvous: Rendezvous, device: torch.device) -> Survey:
    """Why V2 or V1 cannot serve the group with these devices. A collective call; all ranks get the same texts.

    An error while a rank asks about itself is a reason on all ranks, too.
    """
    reason = why_not_world_size(rendezvous.world)
    reason = reason or rendezvous.agree(_library.cuda_missing)
    if reason or rendezvous.world == 1:
        return Survey(reason, reason)

    hosts, reason = _ask_all(rendezvous, "its host cannot be determined", host_id)
    reason = reason or _why_not_hosts(hosts)
    if reason:
        return Survey(reason, reason)

    uuids, reason = _ask_all(rendezvous, "its GPU cannot be determined", lambda: device_uuid(_must_be_gpu(device)))
    if reason:
        return Survey(reason, reason)

    rows, reason = _ask_all(
        rendezvous,
        "its GPU's peer access cannot be determined",
        lambda: "".join(kind.value for kind in peer_access(device, uuids)),
    )
    reason = reason or _why_not_access(rows) or transfer_check.check(rendezvous, uuids)
    return Survey(reason or _why_not_nvlink(rows), reason)


def _ask_all(rendezvous: Rendezvous, failing: str, ask: Callable[[], str]) -> tuple[list[str], str]:
    """Every rank's answer, and the first rank's reason why it has none, alike on all."""
    try:
        answer = "+" + ask()
    except Exception as error:
        answer = f"-{failing} ({type(error).__name__}: {error})"
    answers = rendezvous.texts(answer)
    failed = (f"rank {rank}: {text[1:]}" for rank, text in enumerate(answers) if not text.startswith("+"))
    return [text[1:] for text in answers], next(failed, "")


def _must_be_gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise ValueError(f"got device {device}; expected a CUDA device")
    return device


def _why_not_hosts(hosts: Sequence[str]) -> str:
    other = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), None)
    if other is None:
        return ""
    return f"rank 0 and rank {other} are on different hosts; NCCL serves across hosts"


def _why_not_access(rows: Sequence[str]) -> str:
    pair = _first_pair(rows, PeerAccess.NONE)
    if not pair:
        return ""
    return (
        f"no peer access between the GPUs of {pair}; `nvidia-smi topo -p2p r` shows which GPUs have it (an IOMMU or"
        " PCIe access control, ACS, may keep it off)"
    )


def _why_not_nvlink(rows: Sequence[str]) -> str:
    pair = _first_pair(rows, PeerAccess.PEER)
    return f"no NVLink between the GPUs of {pair}; `nvidia-smi topo -m` shows which GPUs have it" if pair else ""


def _first_pair(rows: Sequence[str], kind: PeerAccess) -> str:
    """The first two ranks of which either sees this kind of link to the other; empty if none do."""
    pairs = combinations(range(len(rows)), 2)
    return next((f"rank {a} and rank {b}" for a, b in pairs if kind.value in (rows[a][b], rows[b][a])), "")


def _access_to(own: int, own_uuid: str, visible: dict[str, int], uuid: str) -> PeerAccess:
    if uuid == own_uuid:
        return PeerAccess.SAME
    if uuid not in visible:
        return PeerAccess.UNSEEN
    peer = visible[uuid]
    if not (torch.cuda.can_device_access_peer(own, peer) and torch.cuda.can_device_access_peer(peer, own)):
        return PeerAccess.NONE
    return (
        PeerAccess.NVLINK
        if _cuda_peer_access(own, peer) == 2 and _cuda_peer_access(peer, own) == 2
        else PeerAccess.PEER
    )


def _cuda_peer_access(device: int, peer: int) -> int:
    """What the driver says: 0 for no access, 1 for peer access, 2 for native atomics too, which is NVPeerAccess."""
    return torch.ops.sgl_comm._cuda_peer_access(device, peer)
