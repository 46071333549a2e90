"""What serves a tensor and why: explain(), SGLCOMM_INVARIANT, sizes of workspaces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.errors import error_text
from helpers.fake_gpu import NO_ACCESS, NO_NVLINK, SURVEYS, fake_gpu, on_gpu
from helpers.ranks import capturing, synchronize
from sgl_comm.backends import capability
from sgl_comm.backends.capability import Survey
from sgl_comm.backends.custom_all_reduce_v1 import DEFAULT_MAX_SIZE, CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2, default_max_size
from sgl_comm.backends.explanation import Explanation
from sgl_comm.backends.gpu_all_reduce import MIN_MAX_SIZE
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.backends.thresholds import ALL_SIZES, Thresholds, supported_world_sizes
from sgl_comm.testing import RankContext, run_ranks

KIB, MIB = 1 << 10, 1 << 20
TINY = Thresholds(one_shot_bytes=1 * KIB, ring_bytes=ALL_SIZES, fallback_bytes=4 * KIB)


@contextmanager
def tiny_thresholds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgl_comm.backends.gpu_all_reduce.thresholds_for", lambda world, compute_capability: TINY)
        yield


@contextmanager
def invariant(text: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLCOMM_INVARIANT", text)
        yield


@contextmanager
def log_lines(lines: list[str]) -> Iterator[None]:
    """Collects what the package logs, from INFO on."""
    logger = logging.getLogger("sgl_comm")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass(frozen=True)
class Chosen:
    """What a communicator says of itself, and its explanation of each tensor."""

    backend: str
    reason: str
    lines: list[str]
    explanations: dict[str, Explanation]


def chosen(ctx: RankContext, survey: str) -> Chosen:
    lines: list[str] = []
    tensors = {
        "float": (on_gpu(torch.bfloat16, 2000), "sum"),
        "int": (on_gpu(torch.int32, 2000), "sum"),
        "max": (on_gpu(torch.float32, 2000), "max"),
        "CPU": (torch.ones(4), "sum"),
        "CPU int": (torch.ones(4, dtype=torch.int32), "sum"),
        "CPU max": (torch.ones(4), "max"),
    }
    group = dist.new_group(list(range(ctx.world)))
    with fake_gpu(SURVEYS[survey]), log_lines(lines), sgl_comm.init(group, "cuda:0") as comm:
        explanations = {name: comm.explain(x, reduce_op) for name, (x, reduce_op) in tensors.items()}
        result = Chosen(comm.backend, comm.reason, lines, explanations)
    dist.destroy_process_group(group)
    return result


INT = "the dtype is torch.int32, and the kernels sum float32, bfloat16 or float16"
INT_FIX = "a tensor of float32, bfloat16 or float16"
MAX = "reduce_op is 'max', and the kernels sum"
EXPLAINED_ON_CPU = {
    "CPU": Explanation("shm"),
    "CPU int": Explanation("gloo", "", {"shm": INT}, INT_FIX),
    "CPU max": Explanation("gloo", "", {"shm": MAX}),
}
NVLINK, NVLINK_FIX = NO_NVLINK.split("; ")
ACCESS, ACCESS_FIX = NO_ACCESS.split("; ")

EXPLAINED = {
    "v2": {
        "float": Explanation("v2", "one_shot"),
        "int": Explanation("gloo", "", {"v2": INT, "v1": INT}, INT_FIX),
        "max": Explanation("gloo", "", {"v2": MAX, "v1": MAX}),
    },
    "v1": {
        "float": Explanation("v1", "one_shot_pull", {"v2": NVLINK}, NVLINK_FIX),
        "int": Explanation("gloo", "", {"v2": NVLINK, "v1": INT}, f"{NVLINK_FIX}; {INT_FIX}"),
        "max": Explanation("gloo", "", {"v2": NVLINK, "v1": MAX}, NVLINK_FIX),
    },
    "gloo": dict.fromkeys(("float", "int", "max"), Explanation("gloo", "", {"v2": ACCESS, "v1": ACCESS}, ACCESS_FIX)),
    "gloo, two reasons": dict.fromkeys(
        ("float", "int", "max"),
        Explanation("gloo", "", {"v2": NVLINK, "v1": ACCESS}, f"{NVLINK_FIX}; {ACCESS_FIX}"),
    ),
}
REASONS = {"v2": "", "v1": NO_NVLINK, "gloo": NO_ACCESS, "gloo, two reasons": f"{NO_NVLINK}; V1 neither: {NO_ACCESS}"}


@pytest.mark.parametrize("survey", SURVEYS)
def test_explain_says_what_serves_and_why_nothing_better(survey: str) -> None:
    for rank, result in enumerate(run_ranks(chosen, 2, survey)):
        backend = survey.partition(",")[0]
        assert (result.backend, result.reason) == (backend, REASONS[survey])
        assert result.explanations == EXPLAINED[survey] | EXPLAINED_ON_CPU
        why = f" ({result.reason})" if result.reason else ""
        level = "WARNING" if result.reason else "INFO"
        (line,) = result.lines  # one a process
        assert line.startswith(f"{level}: sgl_comm: group ")
        assert line.endswith(f", rank {rank} of 2, cuda:0: served by {backend}{why}")


def explained_on_cpu(ctx: RankContext) -> dict[str, Explanation]:
    assert ctx.comm is not None
    tensors = {"CPU": torch.ones(4), "CPU int": torch.ones(4, dtype=torch.int32), "GPU": on_gpu(torch.float32, 16)}
    found = {name: ctx.comm.explain(x) for name, x in tensors.items()}
    return found | {"CPU max": ctx.comm.explain(torch.ones(4), "max")}


def test_explain_in_a_group_of_the_cpu() -> None:
    why = "the group was initialised for the CPU"
    on_a_gpu = Explanation("gloo", "", {"v2": why, "v1": why}, "init(group, device='cuda')")
    assert run_ranks(explained_on_cpu, 2) == [EXPLAINED_ON_CPU | {"GPU": on_a_gpu}] * 2


def test_an_explanation_is_a_few_lines() -> None:
    assert str(Explanation("v2", "two_shot")) == "served by v2 (two_shot)"
    assert str(EXPLAINED["v1"]["float"]).split("\n") == [
        "served by v1 (one_shot_pull)",
        "not by v2: no NVLink between the GPUs of rank 0 and rank 1",
        "to fix it: `nvidia-smi topo -m` shows which GPUs have it",
    ]


# --- SGLCOMM_INVARIANT


def served_sizes(ctx: RankContext, backend: str, text: str) -> dict[str, object]:
    """Up to which of a few sizes the classes serve, and what explain() says of one above the threshold."""
    sizes = (2, TINY.one_shot_bytes, TINY.fallback_bytes, TINY.fallback_bytes + 2, 1 << 40)
    group = dist.new_group(list(range(ctx.world)))
    found: dict[str, object] = {}
    with fake_gpu(Survey("", ""), backend), tiny_thresholds(), invariant(text):
        for kind in (CustomAllReduceV1, CustomAllReduceV2):
            part = kind(group, "cuda:0")
            served = [size for size in sizes if part.should_custom_ar(on_gpu(torch.bfloat16, size))]
            found[kind.__name__] = (max(served), part.thresholds)
            too_large = on_gpu(torch.bfloat16, TINY.fallback_bytes + 2)
            if not part.should_custom_ar(too_large):
                found[f"{kind.__name__} above"] = part.custom_all_reduce(too_large)
            part.close()
        with sgl_comm.init(group, "cuda:0") as comm:
            found["small"] = comm.explain(on_gpu(torch.bfloat16, TINY.fallback_bytes))
            found["large"] = comm.explain(on_gpu(torch.bfloat16, TINY.fallback_bytes + 2))
    dist.destroy_process_group(group)
    return found


@pytest.mark.parametrize(("backend", "text"), [("gloo", "0"), ("gloo", "1"), ("nccl", "1"), ("nccl", "")])
def test_every_size_is_served_unless_nccl_may_take_over(backend: str, text: str) -> None:
    """gloo never takes over: it is no faster at any size."""
    every = (1 << 40, Thresholds(TINY.one_shot_bytes, ALL_SIZES, ALL_SIZES))
    for found in run_ranks(served_sizes, 2, backend, text):
        assert found == {
            "CustomAllReduceV1": every,
            "CustomAllReduceV2": every,
            "small": Explanation("v2", "one_shot"),
            "large": Explanation("v2", "one_shot"),
        }


def test_nccl_takes_over_above_its_threshold_where_it_may() -> None:
    limited = (TINY.fallback_bytes, TINY)
    why = "4098 bytes are more than 4096, and SGLCOMM_INVARIANT is 0"
    for found in run_ranks(served_sizes, 2, "nccl", "0"):
        assert found == {
            "CustomAllReduceV1": limited,
            "CustomAllReduceV1 above": None,
            "CustomAllReduceV2": limited,
            "CustomAllReduceV2 above": None,
            "small": Explanation("v2", "one_shot"),
            "large": Explanation("nccl", "", {"v2": why, "v1": why}, "SGLCOMM_INVARIANT=1"),
        }


def init_errors(ctx: RankContext, text_on_rank_1: str) -> list[str]:
    """Of the communicator and of each class, where rank 1 alone has a bad setting."""
    group = dist.new_group(list(range(ctx.world)))
    makers: list[Callable[[], object]] = [
        lambda: sgl_comm.init(group, "cuda:0"),
        lambda: CustomAllReduceV1(group, "cuda:0"),
        lambda: CustomAllReduceV2(group, "cuda:0"),
    ]
    with fake_gpu(Survey("", "")):
        with invariant(text_on_rank_1 if ctx.rank == 1 else "1"):
            texts = [error_text(make) for make in makers]
        with sgl_comm.init(group, "cuda:0") as comm:
            texts.append(comm.backend)
    dist.destroy_process_group(group)
    return texts


def test_a_bad_setting_on_one_rank_is_an_error_on_all() -> None:
    problem = "got SGLCOMM_INVARIANT='yes'; expected 0 or 1"
    for rank, texts in enumerate(run_ranks(init_errors, 2, "yes")):
        assert texts == [f"init: {problem}" if rank == 1 else f"init: rank 1: {problem}"] * 3 + ["v2"]


def sizes_refused(ctx: RankContext) -> list[str]:
    group = dist.new_group(list(range(ctx.world)))
    texts = []
    with fake_gpu(Survey("", "")):
        for size in (0, -MIN_MAX_SIZE, MIN_MAX_SIZE + 1, 1000):
            mine = size if ctx.rank == 1 else MIN_MAX_SIZE
            for kind in (CustomAllReduceV1, CustomAllReduceV2):
                texts.append(error_text(lambda make=kind, size=mine: make(group, "cuda:0", max_size=size)))
            texts.append(error_text(lambda size=mine: sgl_comm.init(group, "cuda:0", max_size=size)))
        with sgl_comm.init(group, "cuda:0", max_size=MIN_MAX_SIZE) as comm:
            texts.append(comm.backend)
    dist.destroy_process_group(group)
    return texts


def test_a_bad_max_size_on_one_rank_is_an_error_on_all() -> None:
    for texts in run_ranks(sizes_refused, 2):
        *refused, backend = texts
        assert len(refused) == 12
        assert all("max_size" in text and "expected a multiple of 65536 bytes, above 0" in text for text in refused)
        assert backend == "v2"


# --- how large workspaces are

CONTROL_BYTES, CREDITS_BYTES, FLAG_BYTES, BLOCK_BYTES, NUM_BANKS = 4 * KIB, 56 * KIB, 16 * KIB, 2 * MIB, 3
COUNTS_BYTES, BROADCAST_BYTES = 32 * KIB, 4352 * KIB


def rounded(num_bytes: int) -> int:
    """To whole blocks, as a workspace is allocated."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@pytest.mark.parametrize("world", supported_world_sizes())
def test_workspaces_are_as_small_as_documented(world: int) -> None:
    max_size = default_max_size(world)
    banks = NUM_BANKS * (world - 1) * max_size
    v2 = rounded(CONTROL_BYTES + CREDITS_BYTES + COUNTS_BYTES + banks + BROADCAST_BYTES)
    v1 = rounded(CONTROL_BYTES + FLAG_BYTES + DEFAULT_MAX_SIZE + DEFAULT_MAX_SIZE // world + 16)
    assert max_size % MIN_MAX_SIZE == 0
    assert MIN_MAX_SIZE < max_size <= 8 * MIB
    assert v2 <= 52 * MIB
    assert v1 <= 14 * MIB
    assert v2 + v1 <= 66 * MIB
    assert max_size == 8 * MIB or v2 == 52 * MIB, "no more is given up than must be"


# --- real GPUs


def chosen_on_gpus(ctx: RankContext, survey: str) -> Chosen:
    lines: list[str] = []
    group = dist.new_group(list(range(ctx.world)))
    tensors = {
        "float": (torch.ones(1000, dtype=torch.bfloat16, device=ctx.device), "sum"),
        "large": (on_gpu(torch.bfloat16, 3 * MIB, ctx.device), "sum"),
        "very large": (on_gpu(torch.bfloat16, 1 << 30, ctx.device), "sum"),
        "int": (torch.ones(4, dtype=torch.int32, device=ctx.device), "sum"),
        "max": (torch.ones(4, device=ctx.device), "max"),
        "CPU": (torch.ones(4), "sum"),
    }
    with pytest.MonkeyPatch.context() as patch:
        if survey != "v2":
            patch.setattr(capability, "survey", lambda link, device: SURVEYS[survey])
        patch.setattr(
            "sgl_comm.backends.gpu_all_reduce.thresholds_for", lambda *_: Thresholds(2 * MIB, ALL_SIZES, ALL_SIZES)
        )
        with log_lines(lines):
            comm = sgl_comm.init(group, ctx.device)
    explanations = {name: comm.explain(x, reduce_op) for name, (x, reduce_op) in tensors.items()}
    wrong = [
        f"{name}: got {out.unique().tolist()}"
        for name, (x, reduce_op) in tensors.items()
        if isinstance(x, Tensor)
        and (out := comm.all_reduce(x, reduce_op)).unique().tolist() != [1 if reduce_op == "max" else ctx.world]
    ]
    assert not wrong, wrong
    result = Chosen(comm.backend, comm.reason, lines, explanations)
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)
    return result


EXPLAINED_ON_GPUS = {
    "v2": {
        "float": ("v2", "one_shot"),
        "large": ("v2", "two_shot"),
        "very large": ("v2", "two_shot_ring"),
        "int": ("gloo", ""),
        "max": ("gloo", ""),
        "CPU": ("shm", ""),
    },
    "v1": {
        "float": ("v1", "one_shot_pull"),
        "large": ("v1", "two_shot_pull"),
        "very large": ("v1", "two_shot_pull"),
        "int": ("gloo", ""),
        "max": ("gloo", ""),
        "CPU": ("shm", ""),
    },
    "gloo": dict.fromkeys(("float", "large", "very large", "int", "max"), ("gloo", "")) | {"CPU": ("shm", "")},
}


@pytest.mark.gpu
@pytest.mark.parametrize("survey", EXPLAINED_ON_GPUS)
def test_explain_with_gpus(survey: str) -> None:
    for result in run_ranks(chosen_on_gpus, 3, survey, device="cuda"):
        assert (result.backend, result.reason) == (survey, REASONS[survey])
        explained = {name: (each.backend, each.algorithm) for name, each in result.explanations.items()}
        assert explained == EXPLAINED_ON_GPUS[survey]
        assert len(result.lines) == 1
        assert f": served by {survey}" in result.lines[0]


def captured_with_gloo_alone(ctx: RankContext, survey: str) -> dict[str, str]:
    """Calls in a capture that only gloo could serve: each error's text, and whether the process goes on."""
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capability, "survey", lambda link, device: SURVEYS[survey])
        comm = sgl_comm.init(group, ctx.device)
    floats, ints = torch.ones(6000, device=ctx.device), torch.ones(6, dtype=torch.int32, device=ctx.device)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce of ints": lambda: comm.all_reduce(ints),
        "all_reduce_ of ints": lambda: comm.all_reduce_(ints),
        "all_reduce by max": lambda: comm.all_reduce(floats, "max"),
        "reduce_scatter of ints": lambda: comm.reduce_scatter(ints),
    }
    if survey != "v2":
        calls |= {
            "reduce_scatter": lambda: comm.reduce_scatter(floats),
            "all_gather": lambda: comm.all_gather(floats),
        }
    if survey == "gloo":
        calls |= {"all_reduce": lambda: comm.all_reduce(floats), "all_reduce_": lambda: comm.all_reduce_(floats)}

    def captured(call: Callable[[], object]) -> None:
        graph, kept = torch.cuda.CUDAGraph(), torch.zeros(1, device=ctx.device)
        with comm.capture(), capturing(graph):
            kept += 1
            call()

    graph, counted = torch.cuda.CUDAGraph(), torch.zeros(1, device=ctx.device)
    counted += 0  # loads torch's kernel, which a capture should not do
    texts = {name: error_text(lambda call=call: captured(call)) for name, call in calls.items()}
    with capturing(graph):
        counted += 1
    graph.replay()
    works = counted.item() == 1 and comm.all_reduce(floats).unique().tolist() == [ctx.world]
    works &= comm.all_reduce(ints).unique().tolist() == [ctx.world] and comm.backend == survey
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)
    return texts | {"afterwards": "works" if works else "does not work"}


@pytest.mark.gpu
@pytest.mark.parametrize("survey", ["gloo", "v1", "v2"])
def test_what_gloo_alone_can_serve_is_refused_in_a_capture(survey: str) -> None:
    for rank, texts in enumerate(run_ranks(captured_with_gloo_alone, 2, survey, device="cuda")):
        assert texts.pop("afterwards") == "works"
        assert len(texts) == {"gloo": 8, "v1": 6, "v2": 4}[survey]
        for name, text in texts.items():
            assert "inside a CUDA graph capture" in text, (rank, name, text)
            assert "only gloo serves it" in text, (rank, name, text)
            assert "expected a call outside the capture, or a group with NCCL" in text, (rank, name, text)
            reason = REASONS[survey].partition(";")[0] or "the kernels sum float32, bfloat16 or float16"
            assert reason in text, (rank, name, text)


def nccl_takes_over(ctx: RankContext) -> list[str]:
    """SGLCOMM_INVARIANT=0 in a group that is taken for one of NCCL; here gloo does NCCL's part."""
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch, tiny_thresholds(), invariant("0"):
        patch.setattr(Rendezvous, "backend_for", lambda self, device_type: "nccl")
        comm = sgl_comm.init(group, ctx.device)
    wrong = []
    assert comm._v2 is not None
    for count in (1, TINY.fallback_bytes // 4, TINY.fallback_bytes // 4 + 1, 100_000):
        x = torch.ones(count, device=ctx.device)
        above = count * 4 > TINY.fallback_bytes
        explained = comm.explain(x).backend
        out = comm.all_reduce(x)
        by_class = comm._v2.custom_all_reduce(x)
        if explained != ("nccl" if above else "v2") or (by_class is None) != above:
            wrong.append(f"{count} elements: served by {explained}, and the class gave {by_class}")
        if out.unique().tolist() != [ctx.world]:
            wrong.append(f"{count} elements: got {out.unique().tolist()}")
    synchronize(ctx)
    comm.close()
    dist.destroy_process_group(group)
    return wrong


@pytest.mark.gpu
def test_above_the_threshold_the_groups_own_backend_serves() -> None:
    assert run_ranks(nccl_takes_over, 2, device="cuda") == [[], []]
