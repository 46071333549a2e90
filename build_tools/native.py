"""Compiles the libraries: what there is to compile with, ninja's file, ninja, and where the results are.

Everything lies in `build/native` of the project, for editable installs, wheels and `build_ext` alike, so that none
compiles what another has compiled. Objects of C++ files have a folder a torch version, kernels one a list of
architectures (they know nothing of torch).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import ninja_file, toolchain, torch_finder, torch_headers
from build_tools.settings import Settings, read_settings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "build/native"
FETCHED_HEADERS = ROOT / FOLDER / "torch_headers"
# The oldest torch whose stable ABI the code keeps to, and with it the oldest torch the built libraries load in.
TORCH_TARGET_VERSION = "2.11"

# Of the kernels, which ninja is given before all else, these take longest.
_LONGEST_FIRST = ("all_reduce_layernorm.cu", "two_shot.cu", "one_shot.cu", "pull.cu", "all_gather.cu")


@dataclass(frozen=True)
class Built:
    """The libraries of a build that has succeeded, and the record of how they were made."""

    libraries: tuple[Path, ...]
    info: dict[str, Any]


def find_torch() -> torch_finder.TorchFiles | None:
    """The torch that is imported after the build; else the headers of one that are, or can be, fetched for it."""
    return torch_finder.importable_torch() or torch_finder.find_torch() or _fetched_headers()


def torch_to_build_with() -> torch_finder.TorchFiles:
    """What `find_torch` finds.

    Raises:
        RuntimeError: there is none.
    """
    torch = find_torch()
    if torch is not None:
        return torch
    raise RuntimeError(
        f"building sgl_comm needs torch >= {torch_finder.MIN_TORCH_TEXT}, and this Python ({sys.executable}) has none:"
        " install it first, or build with `pip install .`, which fetches it"
    )


def _fetched_headers() -> torch_finder.TorchFiles | None:
    return torch_headers.fetched(FETCHED_HEADERS) or torch_headers.fetch(FETCHED_HEADERS)


def _sources(*patterns: str) -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    order = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    return sorted(found, key=lambda source: order.get(Path(source).name, len(order)))


def _cxx_standard(torch: torch_finder.TorchFiles) -> str:
    """The language that torch's headers are written in."""
    return "c++20" if torch_finder.version_pair(torch.version) >= (2, 13) else "c++17"


def _libraries(plan: toolchain.CudaPlan, library_dirs: list[str]) -> tuple[ninja_file.Library, ...]:
    cpu = ninja_file.Library("_C", tuple(_sources("csrc/*.cpp", "csrc/cpu/*.cpp")), ("torch_cpu",))
    if plan.cuda is None:
        return (cpu,)
    link = [f"-L{folder}" for folder in library_dirs]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    sources = tuple(_sources("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp", "csrc/fallback.cpp"))
    return cpu, ninja_file.Library("_C_cuda", sources, ("torch_cuda", "torch_cpu"), tuple(link))


def _link_to(name: str, target: str | Path) -> str:
    """`target` under a name in the build folder, relative to the project."""
    link = ROOT / FOLDER / "links" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or os.readlink(link) != str(target):
        scratch = link.with_name(f".{name}.{os.getpid()}")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target)
        os.replace(scratch, link)
    return f"{FOLDER}/links/{name}"


def _python_headers() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise RuntimeError(
            f"sgl_comm's build: Python.h is not in {folder}: install Python's headers (Debian: python3-dev, Fedora:"
            " python3-devel)"
        )
    return folder


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _safe(text: str) -> str:
    """As part of a path: letters, digits and what versions and lists of architectures hold."""
    return "".join(c if c.isalnum() or c in ".+_" else "-" for c in text)


def _planned(settings: Settings, torch: torch_finder.TorchFiles) -> tuple[ninja_file.Build, dict[str, Any]]:
    """What is to be built, and the record of it. Writes nothing outside the build folder, and compiles nothing."""
    memory = toolchain.Memory(ROOT / FOLDER / "known_tools.json")
    standard = _cxx_standard(torch)
    cxx = toolchain.find_cxx(settings, standard, memory)
    plan = toolchain.plan_cuda(settings, torch.cuda, cxx, "c++17", memory)
    archs = ";".join(map(str, plan.archs))
    what = f"for {archs} with nvcc {plan.nvcc_version}" if plan.cuda is not None else f"left out: {plan.reason}"
    print(f"sgl_comm: building against torch {torch.version}; CUDA {what}", file=sys.stderr, flush=True)

    system_dirs = [_link_to(f"torch{i}", folder) for i, folder in enumerate(torch.include_dirs)]
    system_dirs.append(_link_to("python", _python_headers()))
    library_dirs = []
    if plan.cuda is not None:
        system_dirs += [_link_to(f"cuda{i}", folder) for i, folder in enumerate(plan.cuda.include_dirs)]
        library_dirs = [_link_to(f"cudalib{i}", folder) for i, folder in enumerate(plan.cuda.library_dirs)]
    host = _safe(f"torch-{torch.version}")
    kernels = _safe(f"cuda-{archs}") if plan.cuda is not None else "cpu"
    build = ninja_file.Build(
        folder=FOLDER,
        host_folder=f"{FOLDER}/{host}",
        kernels_folder=f"{FOLDER}/{kernels}",
        out_folder=f"{FOLDER}/{host}/{kernels}",
        cxx=cxx.command,
        cpp_flags=settings.cpp_flags,
        link_flags=settings.link_flags,
        standard=standard,
        system_dirs=tuple(system_dirs),
        precompile=cxx.precompiles,
        libraries=_libraries(plan, library_dirs),
        nvcc=None if plan.cuda is None else plan.cuda.nvcc,
        cxx_program=cxx.program,
        archs=plan.archs,
    )
    made_with = {
        build.host_stamp: f"{cxx.version}\ntorch {torch.version} {torch.commit}\nPython {sys.version_info[:2]}\n",
        build.kernels_stamp: f"nvcc {plan.nvcc_version}\n{cxx.version}\n",
        build.precompiled: '#include "precompiled.h"\n',
    }
    for path, text in made_with.items():
        _write_if_changed(ROOT / path, text)
    info = {
        "torch_version": torch.version,
        "torch_target_version": TORCH_TARGET_VERSION,
        "torch_cuda_version": torch.cuda,
        "cxx_compiler": cxx.version,
        "cuda_built": plan.cuda is not None,
        "cuda_reason": plan.reason,
        "nvcc_version": plan.nvcc_version,
        "cuda_archs": archs if plan.cuda is not None else None,
    }
    return build, info


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build of this tree at a time; a second one waits."""
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(text: str, jobs: int) -> None:
    ninja = toolchain.find_ninja(ROOT / FOLDER / "ninja.txt")
    if ninja is None:
        raise RuntimeError("sgl_comm's build: no ninja that runs is on PATH: install it with `pip install ninja`")
    _write_if_changed(ROOT / FOLDER / "build.ninja", text)
    scratch = ROOT / FOLDER / "tmp"
    scratch.mkdir(exist_ok=True)
    # What decides a compilation stands in ninja's file; these would change it from outside.
    environ = {name: value for name, value in os.environ.items() if name not in ("LD_RUN_PATH", "CPATH")}
    environ["TMPDIR"] = f"{FOLDER}/tmp"  # relative: compilers stumble over odd characters of a path
    try:
        subprocess.run([ninja, "-f", f"{FOLDER}/build.ninja", f"-j{jobs}"], cwd=ROOT, env=environ, check=True)
    except subprocess.CalledProcessError:
        raise RuntimeError("sgl_comm's build: a compiler failed, see above; what was installed is as it was") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compile_libraries(version: str) -> Built:
    """Compiles what has changed. Nothing outside the build folder is touched.

    Args:
        version: of the package, for the record.

    Raises:
        RuntimeError: something to compile with is missing or wrong (nothing has been compiled), or a compiler failed.
    """
    with _alone():
        settings = read_settings()
        build, info = _planned(settings, torch_to_build_with())
        _compile(ninja_file.ninja_file(build), toolchain.num_jobs(settings))
        libraries = tuple(ROOT / build.output(library) for library in build.libraries)
        return Built(libraries, {"version": version, **info})


def install(built: Built, folder: Path, record: str) -> list[Path]:
    """Puts the libraries and their record where they are wanted, each at once; files that are the same stay.

    Returns the files. A library of an earlier build that this one has not is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path.read_bytes() for path in built.libraries}
    wanted[record] = (json.dumps(built.info, indent=2) + "\n").encode()
    for name, content in wanted.items():
        target = folder / name
        if target.is_file() and not target.is_symlink() and target.read_bytes() == content:
            continue
        scratch = folder / f".{name}.{os.getpid()}"
        scratch.write_bytes(content)
        scratch.chmod(0o755 if name.endswith(".so") else 0o644)
        os.replace(scratch, target)
    for path in folder.glob("_C*.so"):
        if path.name not in wanted:
            path.unlink()
    return [folder / name for name in wanted]
