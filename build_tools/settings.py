"""The environment variables that the build reads. Values that cannot be meant are refused before anything is compiled.

| variable | meaning |
|---|---|
| `SGLCOMM_BUILD_CUDA` | the CUDA library: `auto` (default) where it can be built; `1`: else an error; `0`: never |
| `TORCH_CUDA_ARCH_LIST` | GPU architectures, such as `8.0;9.0+PTX`, or `native` (the GPUs of this machine) |
| `CUDA_HOME`, else `CUDA_PATH` | the CUDA toolkit; else that of the `nvcc` on PATH, else /usr/local/cuda |
| `CXX` | the C++ compiler, of several words too (`ccache g++`); also nvcc's host compiler |
| `CPPFLAGS`, `CXXFLAGS`, `LDFLAGS` | further flags for C++ files and for linking, before the build's own |
| `MAX_JOBS` | compilers to run at once; else one a core, as far as memory goes |
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

OLD_NAMES = {"SGLCOMM_BUILD_CUDA": "SGL_COMM_BUILD_CUDA"}

# What torch's own build calls these architectures.
_ARCH_NAMES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}
_ARCHS_EXPECTED = "architectures such as '8.0;9.0+PTX' or 'Hopper', or 'native'"


@dataclass(frozen=True, order=True)
class Arch:
    """A GPU architecture to compile for: its machine code and, if `ptx`, code that newer GPUs compile themselves."""

    major: int
    minor: int
    suffix: str = ""  # "a": this architecture alone; "f": its family
    ptx: bool = False

    @property
    def number(self) -> str:
        """As nvcc writes it: `90a`."""
        return f"{self.major}{self.minor}{self.suffix}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"


@dataclass(frozen=True)
class Settings:
    """What the environment asks of the build. None where it says nothing."""

    build_cuda: bool | None
    archs: tuple[Arch, ...] | None  # empty for `native`
    cuda_home: tuple[str, str] | None  # the variable and its value
    cxx: tuple[str, ...] | None
    max_jobs: int | None
    cpp_flags: tuple[str, ...]
    link_flags: tuple[str, ...]


def refused(name: str, got: str, expected: str) -> RuntimeError:
    """The error for a variable's value."""
    what = f"{got!r}" if got.strip() else f"{got!r} (it is set, and empty)"
    return RuntimeError(f"sgl_comm's build: {name}: got {what}; expected {expected}, or the variable unset")


def _given(environ: Mapping[str, str], name: str, expected: str) -> str | None:
    text = environ.get(name)
    if text is None and name in OLD_NAMES:
        text = environ.get(OLD_NAMES[name])
        if text is not None:
            print(f"sgl_comm: {OLD_NAMES[name]} is an old name and still works; it is now {name}", flush=True)
    if text is None:
        return None
    if not text.strip():
        raise refused(name, text, expected)
    return text.strip()


def _build_cuda(environ: Mapping[str, str]) -> bool | None:
    name, expected = "SGLCOMM_BUILD_CUDA", "0, 1 or auto"
    text = _given(environ, name, expected)
    wishes = {None: None, "auto": None, "0": False, "1": True}
    if text not in wishes:
        raise refused(name, str(text), expected)
    return wishes[text]


def parse_archs(text: str, name: str = "TORCH_CUDA_ARCH_LIST") -> tuple[Arch, ...]:
    """Architectures in the words of `TORCH_CUDA_ARCH_LIST`, sorted, each once; none for `native`.

    Raises:
        RuntimeError: a word that is no architecture, or no word at all.
    """
    if text.strip() == "native":
        return ()
    archs: dict[tuple[int, int, str], bool] = {}
    words = [word for word in re.split(r"[;,\s]+", text) if word]
    for word in words:
        for one in _ARCH_NAMES.get(word.removesuffix("+PTX"), word).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", one)
            if match is None:
                raise refused(name, text, f"{_ARCHS_EXPECTED} ({word!r} is none)")
            key = int(match[1]), int(match[2]), match[3]
            archs[key] = archs.get(key, False) or match[4] is not None
    if not archs:
        raise refused(name, text, _ARCHS_EXPECTED)
    return tuple(sorted(Arch(*key, ptx) for key, ptx in archs.items()))


def _words(environ: Mapping[str, str], name: str, expected: str) -> tuple[str, ...] | None:
    text = _given(environ, name, expected)
    if text is None:
        return None
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise refused(name, text, f"{expected} ({error})") from error


def _flags(environ: Mapping[str, str], *names: str) -> tuple[str, ...]:
    given = [name for name in names if environ.get(name, "").strip()]  # an empty list of flags is one
    return tuple(word for name in given for word in _words(environ, name, "flags, as a shell would read them") or ())


def _max_jobs(environ: Mapping[str, str]) -> int | None:
    name, expected = "MAX_JOBS", "a whole number from 1"
    text = _given(environ, name, expected)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,6}", text) is None or int(text) < 1:
        raise refused(name, text, expected)
    return int(text)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Reads and checks every variable.

    Raises:
        RuntimeError: a value that cannot be meant; the text names the variable.
    """
    env = os.environ if environ is None else environ
    archs = _given(env, "TORCH_CUDA_ARCH_LIST", _ARCHS_EXPECTED)
    homes = [(name, _given(env, name, "a folder with bin/nvcc")) for name in ("CUDA_HOME", "CUDA_PATH")]
    return Settings(
        build_cuda=_build_cuda(env),
        archs=None if archs is None else parse_archs(archs),
        cuda_home=next(((name, home) for name, home in homes if home is not None), None),
        cxx=_words(env, "CXX", "a C++ compiler"),
        max_jobs=_max_jobs(env),
        cpp_flags=_flags(env, "CPPFLAGS", "CXXFLAGS"),
        link_flags=_flags(env, "LDFLAGS"),
    )
