"""The build backend (PEP 517 and 660): setuptools, plus one thing.

The torch in the environment being installed into is used for the build and left alone. Where there is none, its headers
are fetched, or if that cannot be, the build asks for a torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from build_tools import native, toolchain, torch_finder

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

_MIN_SETUPTOOLS = (70, 1)  # the first that makes wheels by itself


def _check_setuptools() -> None:
    """Without isolation nobody has looked at the versions that pyproject.toml asks for."""
    match = re.match(r"(\d+)\.(\d+)", setuptools.__version__)
    if match is None or (int(match[1]), int(match[2])) < _MIN_SETUPTOOLS:
        raise RuntimeError(
            f"sgl_comm's build: setuptools is {setuptools.__version__}; expected 70.1 or newer: install it with"
            ' `pip install "setuptools>=70.1"`, or build with isolation'
        )


def _native_requirements() -> list[str]:
    """What compiling needs beyond setuptools: ninja where none runs, torch where its headers cannot be had."""
    requirements = []
    if toolchain.find_ninja() is None:
        requirements.append("ninja")
    if native.find_torch() is None:
        requirements.append(torch_finder.TORCH_REQUIREMENT)
    return requirements


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Build requirements of a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requirements()]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Build requirements of an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requirements()]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    """What a wheel will say of itself."""
    _check_setuptools()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    """What an editable install will say of itself."""
    _check_setuptools()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel against the torch that is installed, or will be."""
    _check_setuptools()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Builds the libraries into the source tree, against the torch that is installed, or will be."""
    _check_setuptools()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
