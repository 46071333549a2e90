"""Finds the torch that is already installed where sgl_comm is about to be installed.

Build isolation hides it: pip runs the build with the target's interpreter but takes the target's packages off
`sys.path`. Asking for torch as a build requirement would then download a second one, maybe another version, and throw
it away afterwards. The interpreter still knows where its own packages live, so they can be looked up there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
MIN_TORCH_TEXT = "2.11"


@dataclass(frozen=True)
class InstalledTorch:
    """A torch on disk: its version and the directory that has to be on `sys.path` to import it."""

    version: str
    site_dir: Path

    @property
    def is_supported(self) -> bool:
        """Whether this torch is new enough to build against."""
        return version_pair(self.version) >= MIN_TORCH


def version_pair(version: str) -> tuple[int, int]:
    """The first two numbers of a version: `"2.11.0+cu130"` gives `(2, 11)`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"sgl_comm: cannot read the torch version {version!r}")
    return int(match.group(1)), int(match.group(2))


def _site_dirs(prefix: str) -> list[Path]:
    """The directories in which an environment with this prefix keeps packages for the running Python version."""
    base = {"base": prefix, "platbase": prefix}
    paths = [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    return [Path(path) for path in (*paths, *site.getsitepackages([prefix]))]


def _sees_system_packages() -> bool:
    """Whether the interpreter also reads the base and user packages: always outside a venv, else if asked for."""
    if sys.prefix == sys.base_prefix:
        return True
    config = Path(sys.prefix, "pyvenv.cfg")
    if not config.is_file():
        return False
    return re.search(r"(?im)^include-system-site-packages\s*=\s*true\s*$", config.read_text()) is not None


def own_site_dirs() -> list[Path]:
    """Where the running interpreter finds packages when nothing is hidden, in its own order."""
    dirs = _site_dirs(sys.prefix)
    if _sees_system_packages():
        dirs += [Path(site.getusersitepackages()), *_site_dirs(sys.base_prefix)]
    return list(dict.fromkeys(dirs))


def activated_site_dirs() -> list[Path]:
    """Packages of the activated environment.

    Build front ends other than pip run the build in an environment with an interpreter of its own; the activated one
    is then the best guess at where the user has torch. It is only built against, so a wrong guess does no harm.
    """
    prefixes = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    return [path for prefix in prefixes for path in _site_dirs(prefix)]


def _torch_in(directory: Path) -> InstalledTorch | None:
    """The torch installed in this directory, if any. A development install that only links there does not count."""
    if not (directory / "torch" / "__init__.py").is_file():
        return None
    for found in importlib.metadata.distributions(name="torch", path=[str(directory)]):
        return InstalledTorch(found.version, directory)
    return None


def find_torch() -> InstalledTorch | None:
    """The installed torch to build against, or None if there is none.

    Raises:
        RuntimeError: the environment has a torch that is too old. Going on would make the installer replace it.
    """
    for directory in own_site_dirs():
        found = _torch_in(directory)
        if found is None:
            continue
        if not found.is_supported:
            raise RuntimeError(
                f"sgl_comm needs torch >= {MIN_TORCH_TEXT}, but {found.site_dir} has torch {found.version}. "
                "It was left as it is; install a newer torch first."
            )
        return found
    candidates = (_torch_in(directory) for directory in activated_site_dirs())
    return next((found for found in candidates if found is not None and found.is_supported), None)


def is_importable() -> bool:
    """Whether `import torch` would already find one: no isolation, or torch came as a build requirement."""
    return importlib.util.find_spec("torch") is not None


def expose(found: InstalledTorch) -> None:
    """Makes the installed torch importable here and in child processes.

    Appended, not put in front: what the isolated environment has of its own (setuptools, ninja) keeps winning.
    """
    directory = str(found.site_dir)
    if directory not in sys.path:
        sys.path.append(directory)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{inherited}{os.pathsep}{directory}" if inherited else directory
