"""What every test module shares: where ranks run; tests marked `gpu` skip, with the reason, where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

from helpers.ranks import CPU_WORLDS, GPU_WORLDS, Ranks, ranks_on

# What Inductor compiles for a CPU is compiled without vector instructions, in the processes of all tests: to find out
# which there are takes it half a minute of trial builds, and each kernel takes it twice as long with them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or no driver that this torch can use"
    return ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many tests of `-n auto` run at once: most have several ranks each, and on a GPU they would wait for it."""
    return min(4, len(os.sched_getaffinity(0))) if _why_no_gpu() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", params=[*ranks_on("cpu", CPU_WORLDS), *ranks_on("cuda", GPU_WORLDS)])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Every device and world; a module's, so that tests of one world follow each other and share its processes."""
    return request.param


@pytest.fixture(scope="module", params=ranks_on("cuda", GPU_WORLDS))
def gpu_ranks(request: pytest.FixtureRequest) -> Ranks:
    return request.param
