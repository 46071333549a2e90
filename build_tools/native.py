"""The two native libraries and the command that compiles them. Imports torch, so only the compile step imports this."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

from build_tools import toolchain, torch_finder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sgl_comm"

# The oldest torch whose stable ABI the code keeps to, and with it the oldest torch the built libraries load in.
TORCH_TARGET_VERSION = "2.11"
_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_STABLE_ONLY"]
# Contraction into fused multiply-adds is off for both compilers: CPU and GPU must round alike.
_CXX_FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
]
_NVCC_FLAGS = [
    "-O3",
    "--expt-relaxed-constexpr",
    "-fmad=false",
    "-Xcompiler",
    "-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off",
]
# The symbols of the static CUDA runtime stay private; torch's own shared runtime must not answer for them.
_LINK_FLAGS = ["-Wl,--exclude-libs,ALL"]
# The stable ABI lives in these; nothing else of torch is linked.
_CPU_LIBRARIES = ["torch_cpu"]
_CUDA_LIBRARIES = ["torch_cuda", "torch_cpu", "cudart_static", "dl", "rt", "pthread"]


def sources(*patterns: str) -> list[str]:
    """Source files that match, sorted, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cxx_standard() -> str:
    """The language the installed torch's headers are written in."""
    return "c++20" if torch_finder.version_pair(torch.__version__) >= (2, 13) else "c++17"


def _flags(extra_defines: list[str]) -> dict[str, list[str]]:
    """Compiler flags for C++ and CUDA files.

    torch's headers are marked as the system's, to keep their warnings out. Paths of the build machine are cut from
    what goes into messages.
    """
    common = [f"-std={cxx_standard()}", *_DEFINES, *extra_defines]
    torch_headers = cpp_extension.include_paths()
    system = [flag for path in torch_headers for flag in ("-isystem", path)]
    maps = [f"-ffile-prefix-map={path}/=" for path in (str(ROOT), *reversed(torch_headers))]
    # nvcc splits at commas; and torch gives it no -gencode when any flag, so also a path in it, contains "arch".
    nvcc_maps = [flag for text in maps if not re.search("arch|,", text) for flag in ("-Xcompiler", text)]
    return {"cxx": [*_CXX_FLAGS, *common, *system, *maps], "nvcc": [*_NVCC_FLAGS, *common, *nvcc_maps]}


def _cpu_extension() -> Extension:
    """`_C`: the contract, the CPU form and the fallback. Needs no CUDA."""
    extension = cpp_extension.CppExtension(
        f"{PACKAGE}._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=_flags([]),
        extra_link_args=_LINK_FLAGS,
        py_limited_api=True,
    )
    extension.libraries = _CPU_LIBRARIES
    return extension


def _cuda_extension() -> Extension:
    """`_C_cuda`: the GPU form, with the CUDA runtime inside so that it needs none from outside."""
    extension = cpp_extension.CUDAExtension(
        f"{PACKAGE}._C_cuda",
        sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=_flags(["-DUSE_CUDA"]),
        extra_link_args=_LINK_FLAGS,
        py_limited_api=True,
    )
    extension.libraries = _CUDA_LIBRARIES
    return extension


def plan_cuda() -> toolchain.CudaPlan:
    """Decides about `_C_cuda` for the installed torch and this machine, and says so."""
    has_sources = bool(sources("csrc/cuda/*.cu"))
    plan = toolchain.plan_cuda(torch.version.cuda, cpp_extension.CUDA_HOME, has_sources, cxx_standard())
    verdict = f"for {plan.archs} with nvcc {plan.nvcc_version}" if plan.build else f"left out: {plan.reason}"
    print(f"sgl_comm: building against torch {torch.__version__}; CUDA {verdict}", file=sys.stderr, flush=True)
    return plan


def build_info(version: str, plan: toolchain.CudaPlan) -> dict[str, Any]:
    """What the built package should know about its own making; `sgl_comm.build_info()` reads it."""
    return {
        "version": version,
        "torch_version": str(torch.__version__),
        "torch_target_version": TORCH_TARGET_VERSION,
        "torch_cuda_version": torch.version.cuda,
        "cxx_compiler": toolchain.first_line_of([cpp_extension.get_cxx_compiler(), "--version"]),
        "cuda_built": plan.build,
        "cuda_reason": plan.reason,
        "nvcc_version": plan.nvcc_version,
        "cuda_archs": plan.archs if plan.build else None,
    }


class NativeBuildExt(cpp_extension.BuildExtension):
    """torch's build command, with a linker that leaves no trace of the machine and names only libraries in use."""

    def build_extensions(self) -> None:
        """Compiles and links both libraries."""
        os.environ.pop("LD_RUN_PATH", None)
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None)
            if command:
                kept = [flag for flag in command if not flag.startswith(("-Wl,-rpath,", "-Wl,-rpath=", "-Wl,-R"))]
                setattr(self.compiler, name, [*kept, "-Wl,--as-needed"])
        super().build_extensions()


def make_command(distribution: Distribution, plan: toolchain.CudaPlan, options: dict[str, Any]) -> NativeBuildExt:
    """The finalized command for what can be built here; `options` say where to and how."""
    if torch_finder.version_pair(torch.__version__) < torch_finder.MIN_TORCH:
        raise RuntimeError(f"sgl_comm needs torch >= {torch_finder.MIN_TORCH_TEXT} to build, got {torch.__version__}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    os.environ.setdefault("MAX_JOBS", str(toolchain.num_jobs()))
    distribution.ext_modules = [_cpu_extension(), *([_cuda_extension()] if plan.build else [])]
    command = NativeBuildExt(distribution)
    for name, value in options.items():
        setattr(command, name, value)
    command.ensure_finalized()
    return command
