"""Which copy of the package this is: a source folder, linked to it, or installed; and what builds it again.

Imports nothing but the standard library, so that a copy without a library says so at once.
"""

from __future__ import annotations

import json
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = "sgl_comm"
HERE = Path(__file__).parent
"""This copy's folder, as Python has found it: its files may be links to a source folder's."""

BUILD_AGAIN = "python -m pip install --no-cache-dir --force-reinstall --no-deps"


def library_of(package: Path, name: str = "_C") -> Path | None:
    """The file that Python would load as this library, None where there is none."""
    spec = PathFinder.find_spec(f"{PACKAGE}.{name}", [str(package)])
    return None if spec is None or spec.origin is None else Path(spec.origin)


def source_of(package: Path) -> Path | None:
    """The source folder that this package's files are in, or are links to; None for an installed copy."""
    root = (package / "__init__.py").resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "csrc").is_dir() else None


def why_no_library(package: Path = HERE, search_path: Sequence[str] | None = None) -> str:
    """What to tell a user whose copy has no library that this Python loads, and what to do."""
    search_path = sys.path if search_path is None else search_path
    strange = sorted(path.name for path in package.glob("_C.*") if path.exists())
    root = source_of(package)
    if strange:
        return (
            f"{PACKAGE}: {package} has {', '.join(strange)}, which this Python ({_this_python()}) does not load; build"
            f" it with this Python: {build_again(package, search_path)}"
        )
    if root is None:
        return (
            f"{PACKAGE}: its library _C is missing from {package}, so the installation is not whole; build it again:"
            f" {build_again(package, search_path)}"
        )
    hidden = _other_copy(package, search_path)
    if hidden is not None:
        folder = package.parent
        away = "run Python from another folder"
        if folder.resolve() != Path.cwd():
            away = f"take {folder} off the search path (PYTHONPATH, or the folder of the script that runs)"
        return (
            f"{PACKAGE}: the source folder {folder}, which has no library of its own, hides the installed package"
            f" {hidden}; {away}, or build the library in place: {_in_place(root)}"
        )
    if any(editable and source == root for source, editable in _sources(search_path)):
        return (
            f"{PACKAGE}: it is installed from {root} as editable, but its library _C is gone from {package}; build it"
            f" again: {_in_place(root)}"
        )
    return (
        f"{PACKAGE}: it is not built: the source folder {root} has no library, and no other copy is installed; build it"
        f" in place: {_in_place(root)}"
    )


def build_again(package: Path = HERE, search_path: Sequence[str] | None = None) -> str:
    """A command that builds this copy again, which pip may otherwise take out of its cache."""
    root = source_of(package)
    if root is not None:
        return _in_place(root)
    sources = [source for source, _ in _sources(sys.path if search_path is None else search_path) if source.is_dir()]
    if sources:
        return f"{BUILD_AGAIN} {shlex.quote(str(sources[0]))}"
    return f"{BUILD_AGAIN} . (in the source folder of {PACKAGE})"


def _in_place(root: Path) -> str:
    return f"python -m pip install -e {shlex.quote(str(root))}"


def _this_python() -> str:
    return f"{sys.version.split()[0]}, {sysconfig.get_config_var('SOABI') or sys.implementation.name}"


def _other_copy(package: Path, search_path: Sequence[str]) -> Path | None:
    """The folder of another copy that has its library: further along the search path, or where pip has linked to."""
    own = (package / "__init__.py").resolve().parent
    folders = [Path(folder or ".", PACKAGE) for folder in search_path]
    folders += [source / PACKAGE for source, editable in _sources(search_path) if editable]
    for folder in folders:
        other = folder.is_dir() and folder.resolve() not in (own, package.resolve()) and library_of(folder)
        if other:
            return folder.absolute()
    return None


def _sources(search_path: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """What pip has installed the package from, and whether as editable, where it has noted so."""
    for found in metadata.distributions(name=PACKAGE, path=list(search_path)):
        try:
            noted = json.loads(found.read_text("direct_url.json") or "{}")
            url = urlparse(noted["url"])
            if url.scheme == "file":
                yield Path(url2pathname(url.path)).resolve(), bool(noted.get("dir_info", {}).get("editable"))
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            continue
