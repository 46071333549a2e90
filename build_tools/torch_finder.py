"""Finds the torch to build against: the one that this Python will import.

Build isolation hides it: pip runs the build with the target's interpreter but takes the target's packages off
`sys.path`. Asking for torch as a build requirement would then download a second one, maybe another version, and throw
it away afterwards. So the interpreter is asked in a process of its own, with the environment that the installer was
started with; whatever brings torch there (`.pth` files, PYTHONPATH, user or system packages) brings it here too.
Nothing is guessed from environments that this Python does not belong to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
MIN_TORCH_TEXT = "2.11"
# 2.11 with its own pre-releases, such as those in NVIDIA's containers. `>=2.11.0a0` would say the same, but also let
# installers choose pre-releases of later versions.
TORCH_REQUIREMENT = "torch>2.10.99"

_ASK = """
import importlib.util, json, sys
spec = importlib.util.find_spec("torch")
print(json.dumps(spec.origin if spec is not None else None))
"""
_ASK_TIMEOUT_S = 60
# What decides which packages a Python sees, and what pip changes for a build.
_PATH_VARIABLES = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONHOME")


@dataclass(frozen=True)
class TorchFiles:
    """A torch on disk. It is not imported: only its headers are used.

    Attributes:
        root: the folder `torch`.
        version: such as `2.11.0+cu130`.
        cuda: the CUDA version it was built with, None without CUDA.
        commit: of its sources.
    """

    root: Path
    version: str
    cuda: str | None
    commit: str

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        """Where its headers are."""
        return self.root / "include", self.root / "include/torch/csrc/api/include"


def version_pair(version: str) -> tuple[int, int]:
    """The first two numbers of a version: `"2.11.0a0+cu130"` gives `(2, 11)`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"sgl_comm: cannot read the torch version {version!r}")
    return int(match[1]), int(match[2])


def read_torch(root: Path) -> TorchFiles | None:
    """The torch in this folder, by its `version.py`; None if it has none (what is left of a removed one).

    Raises:
        RuntimeError: it is too old, or has no headers.
    """
    path = root / "version.py"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*= *(?:'([^']*)'|\"([^\"]*)\"|None)", text, flags=re.MULTILINE)
        return None if match is None else match[1] or match[2]

    version = value("__version__")
    if version is None:
        return None
    if version_pair(version) < MIN_TORCH:
        raise RuntimeError(
            f"sgl_comm needs torch >= {MIN_TORCH_TEXT}, but {root.parent} has torch {version}. "
            "It was left as it is; install a newer torch first."
        )
    torch = TorchFiles(root, version, value("cuda"), value("git_version") or "")
    if not (torch.include_dirs[0] / "torch/csrc/stable/library.h").is_file():
        raise RuntimeError(f"sgl_comm's build: torch {version} in {root} has no headers ({torch.include_dirs[0]})")
    return torch


def front_end_environ() -> dict[str, str]:
    """The environment of the installer that has started this process, as far as it decides what Python imports."""
    environ = dict(os.environ)
    try:
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        given: dict[str, str] = {}
    else:
        given = {name: value for name, _, value in (os.fsdecode(word).partition("=") for word in words) if name}
    for name in _PATH_VARIABLES:
        environ.pop(name, None)
        if name in given:
            environ[name] = given[name]
    return environ


def _ask_interpreter(environ: Mapping[str, str]) -> str | None:
    """Where this interpreter would import torch from."""
    with tempfile.TemporaryDirectory() as empty:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK],
            cwd=empty,
            env=dict(environ),
            stdout=subprocess.PIPE,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=True,
        )
    return json.loads(asked.stdout.splitlines()[-1])


def find_torch() -> TorchFiles | None:
    """The torch that this Python will import once the build is over, or None if there is none.

    Raises:
        RuntimeError: that torch is too old (going on would make the installer replace it), or has no headers.
    """
    origin = _ask_interpreter(front_end_environ())
    return None if origin is None else read_torch(Path(origin).parent)


def importable_torch() -> TorchFiles | None:
    """The torch that this process can import: no isolation, or torch came as a build requirement."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else read_torch(Path(spec.origin).parent)
