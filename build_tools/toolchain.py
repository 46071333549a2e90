"""What this machine can build with: compilers, CUDA, memory. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
GIB_PER_JOB = 2
GIB = 1 << 30

_PROBE_SOURCE = """
#include <cuda_runtime.h>
__global__ void probe(int* out) { *out = 1; }
int run_probe(int* out) { probe<<<1, 1>>>(out); return cudaGetLastError(); }
"""


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA library gets built, and why not otherwise."""

    build: bool
    reason: str | None
    nvcc_version: str | None
    archs: str


def cuda_wish() -> bool | None:
    """`SGLCOMM_BUILD_CUDA`: True (1) makes an unusable CUDA toolkit an error, False (0) leaves CUDA out."""
    text = os.environ.get("SGLCOMM_BUILD_CUDA", "")
    wishes = {"": None, "auto": None, "0": False, "1": True}
    if text not in wishes:
        raise RuntimeError(f"SGLCOMM_BUILD_CUDA: got {text!r}, expected 0, 1, or auto (the default)")
    return wishes[text]


def cuda_archs() -> str:
    """Architectures to compile for, in the words of `TORCH_CUDA_ARCH_LIST`."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS


def first_line_of(command: list[str], pattern: str = r".+") -> str | None:
    """First match of the pattern in what a command prints, or None if it does not run or prints no such thing."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(pattern, text)
    return None if match is None else match.group(match.lastindex or 0)


def nvcc_path(cuda_home: str | None) -> Path | None:
    """nvcc of this toolkit. A CUDA home without nvcc (a runtime-only image) counts as none."""
    path = None if cuda_home is None else Path(cuda_home, "bin", "nvcc")
    return path if path is not None and path.is_file() else None


def probe_nvcc(nvcc: Path, cxx_standard: str) -> str | None:
    """Compiles and links a tiny kernel; returns the complaint, or None if all is well.

    Finds out before the build what would end it: a host compiler too new for nvcc, missing headers, no static runtime.
    """
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cu")
        source.write_text(_PROBE_SOURCE)
        command = [str(nvcc), f"-std={cxx_standard}", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
        if os.environ.get("CC"):
            command += ["-ccbin", os.environ["CC"]]
        command += ["-o", str(Path(directory, "probe.so")), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = (result.stderr or result.stdout).strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def _obstacle(
    torch_cuda: str | None, nvcc: Path | None, nvcc_version: str | None, has_sources: bool, cxx_standard: str
) -> str | None:
    """Why the CUDA library cannot be built, cheapest check first; None if it can."""
    if not has_sources:
        return "there are no CUDA sources in csrc/cuda"
    if torch_cuda is None:
        return "this torch is not a CUDA build"
    if nvcc is None or nvcc_version is None:
        return "nvcc was not found (looked at CUDA_HOME, PATH and /usr/local/cuda)"
    if nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is {nvcc_version} but torch was built with CUDA {torch_cuda}; the major versions must agree"
    complaint = probe_nvcc(nvcc, cxx_standard)
    return None if complaint is None else f"nvcc {nvcc_version} does not work here: {complaint}"


def plan_cuda(torch_cuda: str | None, cuda_home: str | None, has_sources: bool, cxx_standard: str) -> CudaPlan:
    """Decides about the CUDA library.

    Raises:
        RuntimeError: CUDA was asked for (`SGLCOMM_BUILD_CUDA=1`) and cannot be built.
    """
    wish = cuda_wish()
    archs = cuda_archs()
    nvcc = nvcc_path(cuda_home)
    nvcc_version = None if nvcc is None else first_line_of([str(nvcc), "--version"], r"release (\d+\.\d+)")
    if wish is False:
        return CudaPlan(False, "SGLCOMM_BUILD_CUDA=0 was set", nvcc_version, archs)
    obstacle = _obstacle(torch_cuda, nvcc, nvcc_version, has_sources, cxx_standard)
    if obstacle is not None and wish is True:
        raise RuntimeError(f"SGLCOMM_BUILD_CUDA=1, but the CUDA library cannot be built: {obstacle}")
    return CudaPlan(obstacle is None, obstacle, nvcc_version, archs)


def _free_memory() -> int:
    """Bytes that compilers may take: what the machine has available, or less if a control group says so."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        limits += [] if match is None else [int(match.group(1)) * 1024]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file():
        text = group.read_text().strip()
        limits += [int(text)] if text.isdigit() else []
    return min(limits, default=GIB_PER_JOB * GIB)


def num_jobs() -> int:
    """Compilers to run at once: one a core, as long as each has memory (CUDA files take about 2 GiB)."""
    return max(1, min(len(os.sched_getaffinity(0)), _free_memory() // (GIB_PER_JOB * GIB)))
