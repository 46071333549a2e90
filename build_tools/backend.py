"""The build backend (PEP 517 and 660): setuptools, plus one thing.

The torch in the environment being installed into is used for the build and left alone. Only where there is none does
the build ask for one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools import torch_finder

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = Mapping[str, Any] | None


def _native_requirements() -> list[str]:
    """What compiling needs beyond setuptools: torch where none is installed, ninja to compile files in parallel."""
    requirements = []
    if not torch_finder.is_importable() and torch_finder.find_torch() is None:
        requirements.append(f"torch>={torch_finder.MIN_TORCH_TEXT}")
    if shutil.which("ninja") is None:
        requirements.append("ninja")
    return requirements


def _expose_torch() -> None:
    """Makes torch importable; done for the compiling hooks alone, as no other needs it."""
    if torch_finder.is_importable():
        return
    found = torch_finder.find_torch()
    if found is not None:
        torch_finder.expose(found)


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Build requirements of a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requirements()]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Build requirements of an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requirements()]


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel against the installed torch."""
    _expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Builds the libraries into the source tree, against the installed torch."""
    _expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
