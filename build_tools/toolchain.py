"""What this machine can build with: the C++ compiler, the CUDA toolkit, ninja, GPUs, memory. Imports no torch.

Compilers are tried once, and what was found is kept in the build folder until one of them changes: a build that has
nothing to do starts none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build_tools.settings import Arch, Settings, parse_archs, refused

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
DEFAULT_CUDA_HOME = "/usr/local/cuda"
GIB_PER_JOB = 2
GIB = 1 << 30
_TRY_TIMEOUT_S = 300
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # what may stand before a compiler

_CXX_SOURCE = "#include <optional>\n#include <string>\nstd::optional<std::string> probe() { return {}; }\n"
_CUDA_SOURCE = """
#include <cuda_runtime.h>
__global__ void probe(int* out) { *out = 1; }
int run_probe(int* out) { probe<<<1, 1>>>(out); return cudaGetLastError(); }
"""


@dataclass(frozen=True)
class Cxx:
    """The C++ compiler.

    Attributes:
        command: as it is called, launchers and flags of its own included.
        program: the compiler itself, for nvcc.
        version: the first line of what it says of itself.
        precompiles: whether headers that are read once can serve all files (g++ without a launcher).
    """

    command: tuple[str, ...]
    program: str
    version: str
    precompiles: bool


@dataclass(frozen=True)
class Cuda:
    """The CUDA toolkit.

    Attributes:
        nvcc: as it is called.
        version: such as `13.0`.
        include_dirs, library_dirs: where nvcc itself looks.
        numbers: architectures that it knows, such as `90a`.
    """

    nvcc: tuple[str, ...]
    version: str
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA library gets built (`cuda` is there), for which GPUs, and why not otherwise."""

    cuda: Cuda | None
    reason: str | None
    nvcc_version: str | None = None
    archs: tuple[Arch, ...] = ()


class Memory:
    """What was found of files that have not changed since, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def recall(self, what: str, programs: Iterable[str], ask: Callable[[], Any]) -> Any:
        """What `ask()` gave the last time for these programs and these words, else what it gives now."""
        marks = []
        for program in programs:
            path = Path(program).resolve()
            stat = path.stat()
            marks.append(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")
        key = json.dumps([what, marks])
        if key not in self._known:
            self._known[key] = ask()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            os.replace(scratch, self._path)
        return self._known[key]


def _run(command: Sequence[str], cwd: str | None = None) -> tuple[int, str]:
    """Exit status and all output of a command; 127 and the reason where it cannot be started or does not end."""
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TRY_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def _complaint(output: str) -> str:
    lines = output.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def find_ninja(last: Path | None = None) -> str | None:
    """A ninja that runs. One that is there but cannot run (built for another system, a broken script) is none.

    Ninjas of different versions do not read each other's logs and would compile all again; so `last`, a file that holds
    which one built the last time, goes before those on PATH, and is written.
    """
    before = [last.read_text(encoding="utf-8")] if last is not None and last.is_file() else []
    on_path = (shutil.which("ninja", path=folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep))
    for program in (*before, *on_path):
        if program is not None and _run([program, "--version"])[0] == 0:
            if last is not None and before != [program]:
                last.write_text(program, encoding="utf-8")
            return program
    return None


def find_cxx(settings: Settings, standard: str, memory: Memory) -> Cxx:
    """The C++ compiler: CXX, else the first of c++, g++ and clang++ on PATH. It has compiled and linked a little file.

    Raises:
        RuntimeError: there is none, or it cannot compile this standard.
    """
    words = settings.cxx
    if words is None:
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if found is None:
            raise RuntimeError(
                "sgl_comm's build: no C++ compiler: install g++ (Debian: g++, Fedora: gcc-c++), or set CXX"
            )
        words = (found,)
    start = next((i for i, word in enumerate(words) if Path(word).name not in _LAUNCHERS), len(words))
    programs = [shutil.which(word) for word in words[: start + 1]]
    if start == len(words) or None in programs:
        missing = next((word for word, path in zip(words, programs, strict=False) if path is None), "")
        raise refused(
            "CXX", " ".join(words), f"a C++ compiler ({missing!r} is not on PATH)" if missing else "a compiler"
        )
    program = str(programs[-1])

    def ask() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "probe.cpp").write_text(_CXX_SOURCE)
            command = [*words, f"-std={standard}", "-fPIC", "-shared", "-o", "probe.so", "probe.cpp"]
            status, output = _run(command, folder)
            macros = _run([*words, "-dM", "-E", "-x", "c++", os.devnull], folder)[1]
        version = _run([*words, "--version"])[1].strip().splitlines()
        is_gcc = "__GNUC__" in macros and "__clang__" not in macros
        return {
            "complaint": "" if status == 0 else _complaint(output),
            "version": version[0] if version else "unknown",
            "is_gcc": "1" if is_gcc else "",
        }

    asked = memory.recall(f"{words} {standard}", [str(path) for path in programs], ask)
    if asked["complaint"]:
        raise refused("CXX", " ".join(words), f"a compiler of {standard} (this one says: {asked['complaint']})")
    return Cxx(words, program, asked["version"], bool(asked["is_gcc"]) and start == 0)


def _find_nvcc(settings: Settings) -> tuple[str | None, str]:
    """nvcc, or None and where it was looked for.

    Raises:
        RuntimeError: CUDA_HOME names no toolkit, though there is one.
    """
    on_path = shutil.which("nvcc")
    if settings.cuda_home is not None:
        name, home = settings.cuda_home
        nvcc = Path(home, "bin", "nvcc")
        if os.access(nvcc, os.X_OK):
            return str(nvcc), ""
        if not Path(home).is_dir():
            raise refused(name, home, "the folder of a CUDA toolkit (there is no such folder)")
        if on_path is not None:
            raise refused(name, home, f"a folder with bin/nvcc (the one on PATH is {on_path})")
        return None, f"{name} is {home}, which has no bin/nvcc, and there is none on PATH"
    if on_path is not None:
        return on_path, ""
    nvcc = Path(DEFAULT_CUDA_HOME, "bin", "nvcc")
    if os.access(nvcc, os.X_OK):
        return str(nvcc), ""
    return None, f"nvcc was not found (looked at PATH and {DEFAULT_CUDA_HOME}; CUDA_HOME and CUDA_PATH are not set)"


def _ask_nvcc(nvcc: str, cxx: Cxx, standard: str) -> dict[str, Any]:
    """What nvcc says of itself, and whether it can compile and link a little kernel with this C++ compiler."""
    version = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"])[1])
    if version is None:
        return {"complaint": f"{nvcc} does not say its version"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(_CUDA_SOURCE)
        command = [
            nvcc,
            f"-std={standard}",
            "-shared",
            "-cudart",
            "static",
            "-Xcompiler",
            "-fPIC",
            "-ccbin",
            cxx.program,
        ]
        command += ["-o", "probe.so", "probe.cu"]
        status, output = _run(command, folder)
        steps = _run([*command, "--dryrun"], folder)[1]

    def dirs(variable: str, option: str) -> list[str]:
        line = next((line for line in steps.splitlines() if line.startswith(f"#$ {variable}=")), "")
        return [os.path.normpath(path) for path in re.findall(rf'"?{option}([^"]*?)"?(?:\s|$)', line.partition("=")[2])]

    return {
        "version": version[1],
        "complaint": "" if status == 0 else _complaint(output),
        "include_dirs": dirs("INCLUDES", "-I"),
        "library_dirs": dirs("LIBRARIES", "-L"),
        "numbers": sorted(set(re.findall(r"compute_(\d+[af]?)", _run([nvcc, "--help"])[1]))),
    }


def gpu_archs() -> tuple[Arch, ...]:
    """The architectures of this machine's GPUs, as the driver's own tool tells them; none where there is none."""
    status, output = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = re.findall(r"^\s*(\d+\.\d)\s*$", output, flags=re.MULTILINE) if status == 0 else []
    return parse_archs(";".join(found)) if found else ()


def choose_archs(settings: Settings, numbers: Sequence[str], gpus: Sequence[Arch]) -> tuple[Arch, ...]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, else the machine's GPUs, the highest with PTX, else the default.

    Raises:
        RuntimeError: `native` without a GPU, or an architecture that this nvcc does not know.
    """
    known = [arch for arch in gpus if arch.number in numbers]
    of_machine = (*known[:-1], replace(known[-1], ptx=True)) if known else ()
    name, expected = "TORCH_CUDA_ARCH_LIST", f"architectures that this nvcc knows ({' '.join(numbers)})"
    if settings.archs is None:
        # A GPU that is newer than nvcc needs PTX of an older architecture, which the default has.
        return of_machine if len(known) == len(gpus) and known else parse_archs(DEFAULT_CUDA_ARCHS)
    if not settings.archs:
        if not of_machine:
            raise refused(name, "native", f"{expected}: this machine shows no GPU" + (" of these" if gpus else ""))
        return of_machine
    unknown = [str(arch) for arch in settings.archs if arch.number not in numbers]
    if unknown:
        raise refused(name, ";".join(map(str, settings.archs)), f"{expected}; {', '.join(unknown)} is none of them")
    return settings.archs


def plan_cuda(settings: Settings, torch_cuda: str | None, cxx: Cxx, standard: str, memory: Memory) -> CudaPlan:
    """Decides about the CUDA library.

    Raises:
        RuntimeError: CUDA was asked for (`SGLCOMM_BUILD_CUDA=1`) and cannot be built, or a variable is wrong.
    """
    if settings.build_cuda is False:
        return CudaPlan(None, "SGLCOMM_BUILD_CUDA=0 was set")
    plan = _plan_cuda(settings, torch_cuda, cxx, standard, memory)
    if plan.cuda is None and settings.build_cuda is True:
        raise RuntimeError(f"SGLCOMM_BUILD_CUDA=1, but the CUDA library cannot be built: {plan.reason}")
    return plan


def _plan_cuda(settings: Settings, torch_cuda: str | None, cxx: Cxx, standard: str, memory: Memory) -> CudaPlan:
    nvcc, where = _find_nvcc(settings)
    if torch_cuda is None:
        return CudaPlan(None, "this torch is not a CUDA build")
    if nvcc is None:
        return CudaPlan(None, where)
    asked = memory.recall(f"nvcc {standard}", [nvcc, cxx.program], lambda: _ask_nvcc(nvcc, cxx, standard))
    version = asked.get("version")
    if version is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"nvcc is {version} but torch was built with CUDA {torch_cuda}; the major versions must agree"
        return CudaPlan(None, reason, version)
    if asked["complaint"]:
        return CudaPlan(None, f"nvcc {version} ({nvcc}) does not work here: {asked['complaint']}", version)
    launcher = tuple(word for word in cxx.command[:1] if Path(word).name in ("ccache", "sccache"))
    numbers = tuple(asked["numbers"])
    cuda = Cuda((*launcher, nvcc), version, tuple(asked["include_dirs"]), tuple(asked["library_dirs"]), numbers)
    gpus = () if settings.archs else gpu_archs()
    return CudaPlan(cuda, None, version, choose_archs(settings, numbers, gpus))


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


def num_jobs(settings: Settings) -> int:
    """Compilers to run at once: MAX_JOBS, else one a core, as long as each has memory (CUDA files take 2 GiB)."""
    if settings.max_jobs is not None:
        return settings.max_jobs
    return max(1, min(len(os.sched_getaffinity(0)), _free_memory() // (GIB_PER_JOB * GIB)))
