"""The build as ninja reads it. Pure: from what is to be built and with what, to the text of a file.

All paths of the project and its build folder are relative to the project's folder, where ninja runs; those of torch,
Python and CUDA are reached through links in the build folder. So no character of where things lie gets into a command,
and a torch that lies elsewhere, but is the same, compiles nothing anew. What cannot be seen from the commands (which
torch, which compilers) stands in small files that outputs depend on, written when it changes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from build_tools.settings import Arch

# Contraction into fused multiply-adds is off for both compilers, and so is whatever else lets them change a sum: CPU
# and GPU must round alike.
_CXX_FLAGS = (
    *("-g0", "-Wall", "-Wextra", "-fPIC", "-fno-fast-math", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
)
# Few files have loops over the elements of a tensor. In the others, which check, wait and launch, optimising takes a
# third of the compiler's time and gains nothing.
_OPTIMISED, _LOOPS_OPTIMISED = "-O1", "-O3"
WITH_LOOPS = ("csrc/cpu/difference.cpp", "csrc/cpu/row_norm.cpp", "csrc/cpu/sum.cpp")
_NVCC_FLAGS = (
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-fmad=false"),
    *("-Xcompiler", "-O1,-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off"),
)
_DEFINES = (
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"),
    *("-DPy_LIMITED_API=0x030A0000", "-DUSE_CUDA"),
)
# torch's libraries are there when ours are loaded. Until then libraries of their names that hold nothing stand in.
TORCH_STUBS = ("torch_cuda", "torch_cpu")
_HIDE_STATIC = "-Wl,--exclude-libs,ALL"  # torch's own CUDA runtime must not answer for the one inside


@dataclass(frozen=True)
class Library:
    """One library: its sources (relative to the project), and what it is linked with, of torch's and others."""

    name: str
    sources: tuple[str, ...]
    torch_libraries: tuple[str, ...]
    link: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """What is to be built, where and with what.

    Attributes:
        folder: the build folder, relative to the project.
        host_folder, kernels_folder, out_folder: in it, for objects of C++ files and of kernels, and for the libraries.
        cxx, cpp_flags, link_flags: the C++ compiler, and what the user wants beside the build's own flags.
        standard: of C++ files, such as `c++20`.
        system_dirs: folders of headers of others.
        precompile: whether C++ files share headers that are read once.
        nvcc: None without CUDA.
        cxx_program: nvcc's host compiler.
        archs: that kernels are compiled for.
    """

    folder: str
    host_folder: str
    kernels_folder: str
    out_folder: str
    cxx: tuple[str, ...]
    cpp_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    standard: str
    system_dirs: tuple[str, ...]
    precompile: bool
    libraries: tuple[Library, ...]
    nvcc: tuple[str, ...] | None = None
    cxx_program: str = ""
    archs: tuple[Arch, ...] = ()

    @property
    def host_stamp(self) -> str:
        """The file that says which C++ compiler, torch and Python there are."""
        return f"{self.host_folder}/made_with.txt"

    @property
    def kernels_stamp(self) -> str:
        """The file that says which nvcc there is."""
        return f"{self.kernels_folder}/made_with.txt"

    @property
    def stubs_folder(self) -> str:
        """Where the stand-ins for torch's libraries are."""
        return f"{self.host_folder}/torch_stubs"

    @property
    def precompiled(self) -> str:
        """The header that C++ files are compiled with; beside it lies what the compiler made of it."""
        return f"{self.host_folder}/precompiled.h"

    def output(self, library: Library) -> str:
        """Where a library ends up."""
        return f"{self.out_folder}/{library.name}.abi3.so"


def gencode_flags(archs: Iterable[Arch]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for arch in archs:
        code = f"sm_{arch.number}" + (f",compute_{arch.number}" if arch.ptx else "")
        flags.append(f"-gencode=arch=compute_{arch.number},code=[{code}]")
    return flags


def _path(text: str) -> str:
    """A path of the project as ninja wants it."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(words: Sequence[str], variables: str = "") -> str:
    """A command for ninja's shell: words, then text in which ninja's variables stand."""
    return (shlex.join(words).replace("$", "$$") + " " + variables).strip()


def _rule(name: str, command: str, description: str, depfile: bool = False) -> list[str]:
    lines = [f"rule {name}", f"  command = {command}", f"  description = {description}"]
    if depfile:
        lines += ["  depfile = $out.d", "  deps = gcc"]
    return [*lines, ""]


def _edge(rule: str, output: str, inputs: Sequence[str], implicit: Sequence[str] = ()) -> str:
    after = f" | {' '.join(map(_path, implicit))}" if implicit else ""
    return f"build {_path(output)}: {rule} {' '.join(map(_path, inputs))}{after}"


def _rules(build: Build) -> list[str]:
    systems = [word for folder in build.system_dirs for word in ("-isystem", folder)]
    flags = [*build.cpp_flags, _OPTIMISED, *_CXX_FLAGS, f"-std={build.standard}", *_DEFINES, "-Icsrc", *systems]
    files = "$more -MMD -MF $out.d -c $in -o $out"
    header = ["-include", build.precompiled] if build.precompile else []
    lines = _rule("cxx", _command([*build.cxx, *flags, *header], files), "C++ $in", depfile=True)
    lines += _rule("precompile", _command([*build.cxx, *flags, "-x", "c++-header"], files), "C++ $in", depfile=True)
    stub = [*build.cxx, "-shared", "-x", "c++", "/dev/null", "-o"]
    lines += _rule("stub", _command(stub, "$out -Wl,-soname,$soname"), "stub $soname")
    # Search paths of the machine that builds have no place in the library.
    kept = [flag for flag in build.link_flags if not flag.startswith(("-Wl,-rpath", "-Wl,-R"))]
    link = [*build.cxx, "-shared", *kept, _HIDE_STATIC]
    lines += _rule("link", _command(link, "$in -o $out $libraries"), "link $out")
    if build.nvcc is not None:
        compiler = [*build.nvcc, "-ccbin", build.cxx_program, *_NVCC_FLAGS, *gencode_flags(build.archs), "-Icsrc"]
        lines += _rule("kernels", _command(compiler, files), "CUDA $in", depfile=True)
    return lines


def _object(build: Build, source: str) -> str:
    folder = build.kernels_folder if source.endswith(".cu") else build.host_folder
    return f"{folder}/{source}.o"


def ninja_file(build: Build) -> str:
    """The text of `build.ninja`. Kernels come first: they take longest."""
    lines = ["# Written by build_tools/ninja_file.py.", f"builddir = {_path(build.folder)}", "", *_rules(build)]
    made = [f"{build.precompiled}.gch"] if build.precompile else []
    if build.precompile:
        lines.append(_edge("precompile", made[0], ["csrc/precompiled.h"], [build.host_stamp]))
    every = dict.fromkeys(source for library in build.libraries for source in library.sources)
    for source in sorted(every, key=lambda source: not source.endswith(".cu")):
        if source.endswith(".cu"):
            lines.append(_edge("kernels", _object(build, source), [source], [build.kernels_stamp]))
        else:
            lines.append(_edge("cxx", _object(build, source), [source], [build.host_stamp, *made]))
            if source in WITH_LOOPS:
                lines.append(f"  more = {_LOOPS_OPTIMISED}")
    for name in TORCH_STUBS:
        lines.append(_edge("stub", f"{build.stubs_folder}/lib{name}.so", [], [build.host_stamp]))
        lines.append(f"  soname = lib{name}.so")
    for library in build.libraries:
        torch_libraries = [f"-l{name}" for name in library.torch_libraries]
        words = ["-L" + build.stubs_folder, "-Wl,--no-as-needed", *torch_libraries, "-Wl,--as-needed", *library.link]
        stubs = [f"{build.stubs_folder}/lib{name}.so" for name in library.torch_libraries]
        lines.append(_edge("link", build.output(library), [_object(build, s) for s in library.sources], stubs))
        lines.append(f"  libraries = {_command(words)}")
    outputs = " ".join(_path(build.output(library)) for library in build.libraries)
    return "\n".join([*lines, "", f"default {outputs}", ""])
