"""Which backend serves whom: thresholds, capabilities faked rank by rank, and verdicts alike on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import sgl_comm
from helpers.errors import error_text
from sgl_comm import SglCommError, _library
from sgl_comm.backends import capability, dispatch, thresholds, transfer_check
from sgl_comm.backends.capability import PeerAccess, Survey
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.backends.shm_all_reduce import ShmAllReduce
from sgl_comm.testing import RankContext, RankPool, run_ranks

KIB, MIB = 1 << 10, 1 << 20


# --- thresholds

ENTRANCES: dict[str, Callable[[], object]] = {
    "the constructor of V1": lambda: CustomAllReduceV1(None, 0).close(),
    "the constructor of V2": lambda: CustomAllReduceV2(None, 0).close(),
    "supported_world_sizes": thresholds.supported_world_sizes,
    "thresholds_for": lambda: thresholds.thresholds_for(2, (9, 0)),
    "why_not_world_size": lambda: capability.why_not_world_size(2),
    "survey": lambda: capability.survey(Rendezvous.of(None), torch.device("cpu")),
    "can_use_custom_all_reduce_v2": lambda: sgl_comm.can_use_custom_all_reduce_v2(None, "cpu"),
    "dispatch_custom_allreduce": lambda: sgl_comm.dispatch_custom_allreduce(None, "cpu"),
    "ShmAllReduce": lambda: ShmAllReduce(None).close(),
}


def fills_the_table(ctx: RankContext, entrance: str) -> None:
    assert not thresholds._config
    ENTRANCES[entrance]()
    assert len(thresholds._config) == 2
    assert tuple(sorted(thresholds._config[9])) == thresholds.supported_world_sizes() == tuple(range(2, 9))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_each_entrance_alone_fills_the_table(entrance: str) -> None:
    """In a process that has done nothing but import the package and join its default group."""
    with RankPool(1, make_comm=False) as pool:
        pool.run(fills_the_table, entrance)


@pytest.mark.parametrize(
    ("capability", "world", "one_shot"),
    [
        ((9, 0), 2, thresholds.ALL_SIZES),
        ((9, 0), 3, 384 * KIB),
        ((9, 0), 4, 192 * KIB),
        ((9, 0), 5, 192 * KIB),
        ((9, 0), 6, 128 * KIB),
        ((9, 0), 8, 128 * KIB),
        ((10, 0), 2, 4 * MIB),
        ((10, 3), 5, 2 * MIB),
        ((10, 0), 6, 1 * MIB),
        ((10, 0), 7, 896 * KIB),
        ((10, 0), 8, 720 * KIB),
        ((8, 0), 4, 192 * KIB),
        ((12, 0), 3, 384 * KIB),
    ],
)
def test_thresholds(capability: tuple[int, int], world: int, one_shot: int) -> None:
    found = thresholds.thresholds_for(world, capability)
    assert (found.one_shot_bytes, found.fallback_bytes) == (one_shot, 128 * MIB)


@pytest.mark.parametrize(
    ("capability", "world", "ring"),
    [
        ((9, 0), 2, thresholds.ALL_SIZES),
        ((9, 0), 3, 2560 * KIB),
        ((9, 0), 4, 2560 * KIB),
        ((9, 0), 5, thresholds.ALL_SIZES),
        ((10, 0), 4, thresholds.ALL_SIZES),
        ((8, 0), 4, 2560 * KIB),
    ],
)
def test_from_which_size_on_a_ring_serves(capability: tuple[int, int], world: int, ring: int) -> None:
    assert thresholds.thresholds_for(world, capability).ring_bytes == ring


@pytest.mark.parametrize("world", [0, 1, 9])
def test_an_unknown_world_size_has_no_thresholds(world: int) -> None:
    with pytest.raises(SglCommError, match=rf"thresholds_for: got world size {world}; expected one of \(2, 3, 4, 5"):
        thresholds.thresholds_for(world, (9, 0))


def test_world_sizes_that_kernels_serve() -> None:
    assert [world for world in range(-1, 12) if not capability.why_not_world_size(world)] == list(range(1, 9))
    assert capability.why_not_world_size(9) == "world size 9 is not one of 1 to 8"


# --- verdicts of groups of faked GPUs


@dataclass(frozen=True)
class Box:
    """GPUs as a rank sees them. Pairs without NVLink or peer access are given by index; a rank r has GPU gpus[r]."""

    gpus: tuple[int, ...]
    no_nvlink: tuple[tuple[int, int], ...] = ()
    no_access: tuple[tuple[int, int], ...] = ()
    only_own: bool = False
    hosts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    raises: tuple[int, str] | None = None
    transfer: str = ""


@contextmanager
def faked(box: Box, rank: int) -> Iterator[torch.device]:
    """Makes this process see the box; gives the rank's device."""
    own = box.gpus[rank]
    visible = [own] if box.only_own else list(range(max(box.gpus) + 1))

    def among(pairs: tuple[tuple[int, int], ...], a: int, b: int) -> bool:
        return bool({(visible[a], visible[b]), (visible[b], visible[a])} & set(pairs))

    def uuid(device: torch.device | int) -> str:
        index = device.index if isinstance(device, torch.device) else device
        return f"uuid-{visible[index or 0]}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "cuda_missing", box.missing[rank] if box.missing else "")
        patch.setattr(capability, "host_id", lambda: box.hosts[rank] if box.hosts else "host")
        patch.setattr(capability, "device_uuid", uuid)
        patch.setattr(
            capability, "_cuda_peer_access", lambda a, b: 0 if a == b else 1 if among(box.no_nvlink, a, b) else 2
        )
        patch.setattr(torch.cuda, "device_count", lambda: len(visible))
        patch.setattr(torch.cuda, "current_device", lambda: visible.index(own))
        patch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a != b and not among(box.no_access, a, b))
        patch.setattr(transfer_check, "check", lambda link, uuids: link.agree(box.transfer if rank == 1 else ""))
        if box.raises is not None and box.raises[0] == rank:
            where = torch.cuda if hasattr(torch.cuda, box.raises[1]) else capability
            patch.setattr(where, box.raises[1], _boom)
        yield torch.device("cuda", visible.index(own))


def _boom(*_: object) -> None:
    raise OSError("the driver is upset")


def verdict(ctx: RankContext, box: Box) -> tuple[Survey, str, bool]:
    with faked(box, ctx.rank) as device:
        found = capability.survey(Rendezvous.of(ctx.group), device)
        chosen = dispatch.dispatch_custom_allreduce(ctx.group, device)
        return found, chosen.__name__, dispatch.can_use_custom_all_reduce_v2(ctx.group, device)


def agreed(box: Box) -> tuple[Survey, str, bool]:
    """The verdict, after a look that it is alike on all ranks, and that the choice follows from it."""
    found = run_ranks(verdict, len(box.gpus), box)
    assert all(theirs == found[0] for theirs in found)
    survey, chosen, v2 = found[0]
    assert (chosen, v2) == (("CustomAllReduceV1", False) if survey.v2 else ("CustomAllReduceV2", True))
    return found[0]


@pytest.mark.parametrize("box", [Box((0, 1)), Box((0, 0)), Box((0, 1, 0)), Box((0, 1), only_own=True)], ids=str)
def test_v2_serves(box: Box) -> None:
    assert agreed(box)[0] == Survey("", "")


def test_no_nvlink_leaves_v1() -> None:
    survey, _, _ = agreed(Box((0, 1, 2), no_nvlink=((0, 2),)))
    assert survey.v2.startswith("no NVLink between the GPUs of rank 0 and rank 2; `nvidia-smi topo -m` shows")
    assert survey.v1 == ""


def test_no_peer_access_leaves_neither() -> None:
    survey, _, _ = agreed(Box((2, 1, 0), no_access=((0, 1),)))
    assert survey.v2.startswith("no peer access between the GPUs of rank 1 and rank 2; `nvidia-smi topo -p2p r` shows")
    assert "IOMMU" in survey.v2
    assert survey.v1 == survey.v2


def test_links_as_one_process_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = [f"uuid-{index}" for index in (0, 1, 2, 3, 9)]
    with faked(Box((0, 3), no_nvlink=((0, 1),), no_access=((0, 2),)), 0) as device:
        found = capability.peer_access(device, uuids)
        assert found == [PeerAccess.SAME, PeerAccess.PEER, PeerAccess.NONE, PeerAccess.NVLINK, PeerAccess.UNSEEN]
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
        assert capability.peer_access(device, uuids)[3] is PeerAccess.NONE  # one way is not enough


def test_what_one_rank_does_not_see_another_may() -> None:
    def sees(rank: int) -> str:
        return "".join(
            kind.value for kind in ((PeerAccess.SAME, PeerAccess.UNSEEN), (PeerAccess.NONE, PeerAccess.SAME))[rank]
        )

    assert "rank 0 and rank 1" in capability._why_not_access([sees(0), sees(1)])
    assert capability._why_not_access([sees(0), PeerAccess.NVLINK.value + PeerAccess.SAME.value]) == ""


def test_two_hosts_leave_neither() -> None:
    survey, _, _ = agreed(Box((0, 1, 0), hosts=("a", "a", "b")))
    assert survey.v2 == survey.v1 == "rank 0 and rank 2 are on different hosts; NCCL serves across hosts"


def test_one_rank_without_cuda_kernels_decides_for_all() -> None:
    survey, _, _ = agreed(Box((0, 1), missing=("", "the package was built without CUDA")))
    assert survey.v2 == survey.v1 == "rank 1: the package was built without CUDA"


def test_bytes_that_do_not_pass_leave_neither() -> None:
    survey, _, _ = agreed(Box((0, 1), transfer="nothing came"))
    assert survey.v2 == survey.v1 == "rank 1: nothing came"


@pytest.mark.parametrize(
    ("probe", "failing"),
    [
        ("host_id", "its host cannot be determined"),
        ("device_uuid", "its GPU cannot be determined"),
        ("peer_access", "its GPU's peer access cannot be determined"),
        ("device_count", "its GPU's peer access cannot be determined"),
        ("can_device_access_peer", "its GPU's peer access cannot be determined"),
        ("_cuda_peer_access", "its GPU's peer access cannot be determined"),
    ],
)
def test_a_probe_that_raises_on_one_rank_is_a_reason_on_all(probe: str, failing: str) -> None:
    survey, _, _ = agreed(Box((0, 1, 2), raises=(1, probe)))
    assert survey.v2 == survey.v1 == f"rank 1: {failing} (OSError: the driver is upset)"


def test_world_sizes_beyond_eight_are_refused_before_anything_is_asked() -> None:
    link = Rendezvous(group=None, name="big", rank=0, world=9, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert capability.survey(link, torch.device("cuda", 0)) == Survey(*["world size 9 is not one of 1 to 8"] * 2)


# --- names in CUDA_VISIBLE_DEVICES

NAMES = [
    "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    "MIG-8932f937-d72c-5106-812f-20bd9faed9f6",
    "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0",
    "nonsense",
    "",
]


def verdicts_by_name(ctx: RankContext) -> tuple[tuple[Survey, str, bool], Survey]:
    with_gpus = verdict(ctx, Box((0, 1), only_own=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "cuda_missing", "")
        found = capability.survey(Rendezvous.of(ctx.group), torch.device("cuda", 0))
    sgl_comm.init(ctx.group).close()
    return with_gpus, found


@pytest.mark.parametrize("name", NAMES)
def test_any_device_name_is_fine(name: str) -> None:
    with RankPool(2, env={"CUDA_VISIBLE_DEVICES": name}, make_comm=False) as pool:
        results = pool.run(verdicts_by_name)
    assert results[0] == results[1]
    with_gpus, without = results[0]
    assert with_gpus == (Survey("", ""), "CustomAllReduceV2", True)
    assert without.v2 == without.v1
    assert without.v2.startswith("rank 0: its GPU cannot be determined (")


# --- entrances


def on_cpu(ctx: RankContext) -> tuple[bool, bool]:
    chosen = sgl_comm.dispatch_custom_allreduce(ctx.group, "cpu")
    return sgl_comm.can_use_custom_all_reduce_v2(ctx.group, ctx.device), chosen is ShmAllReduce


def test_the_cpu_is_served_by_shared_memory() -> None:
    assert run_ranks(on_cpu, 2) == [(False, True)] * 2


def with_wrong_devices(ctx: RankContext) -> list[str]:
    calls = (dispatch.can_use_custom_all_reduce_v2, dispatch.dispatch_custom_allreduce)
    devices = ("cuda:0" if ctx.rank == 1 else "cpu", "meta" if ctx.rank == 1 else "cpu")
    return [error_text(lambda c=call, d=device: c(ctx.group, d)) for call in calls for device in devices]


def test_devices_that_do_not_fit_are_an_error_on_all_ranks() -> None:
    first, second = run_ranks(with_wrong_devices, 2)
    assert first[0] == "can_use_custom_all_reduce_v2: got devices cpu, cuda on ranks 0 to 1; expected one"
    assert first[2] == "dispatch_custom_allreduce: got devices cpu, cuda on ranks 0 to 1; expected one"
    assert first[1].endswith("rank 1: got device 'meta'; expected the CPU or a CUDA device")
    assert all("got device" in text for text in second)


def test_without_any_group_it_is_an_error() -> None:
    if not dist.is_initialized():
        with pytest.raises(SglCommError, match="got no group and there is no default one"):
            sgl_comm.dispatch_custom_allreduce(None, "cpu")


def logged(ctx: RankContext, boxes: list[Box]) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    dispatch._logged.clear()
    dispatch.logger.addHandler(handler)
    level = dispatch.logger.level
    dispatch.logger.setLevel(logging.INFO)
    try:
        for box in boxes * 2:
            with faked(box, ctx.rank) as device:
                dispatch.dispatch_custom_allreduce(ctx.group, device)
    finally:
        dispatch.logger.removeHandler(handler)
        dispatch.logger.setLevel(level)
    return lines


def test_each_choice_is_logged_once_a_process() -> None:
    boxes = [Box((0, 1)), Box((0, 1), no_nvlink=((0, 1),)), Box((0, 1), hosts=("a", "b"))]
    for rank, lines in enumerate(run_ranks(logged, 2, boxes)):
        assert len(lines) == 3
        who = f"sgl_comm: group '0', rank {rank} of 2, cuda:{rank}: served by "
        assert lines[0] == f"INFO: {who}CustomAllReduceV2"
        assert lines[1].startswith(f"WARNING: {who}CustomAllReduceV1, since V2 cannot: no NVLink between")
        assert lines[2].startswith(f"WARNING: {who}gloo, since V2 cannot: rank 0 and rank 1 are on different hosts")


def test_the_classes_that_are_chosen_are_the_package_s_own() -> None:
    assert dispatch.CustomAllReduceV2 is CustomAllReduceV2
    assert {sgl_comm.can_use_custom_all_reduce_v2, sgl_comm.dispatch_custom_allreduce} == {
        dispatch.can_use_custom_all_reduce_v2,
        dispatch.dispatch_custom_allreduce,
    }
