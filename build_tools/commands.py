"""The setuptools commands of this project. Cheap to import: metadata and sdists are made without torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_tools import torch_finder

PACKAGE = "sgl_comm"
BUILD_INFO = "_build_info.json"

# How the build was asked for; handed on to torch's build command as it is.
_SHARED_OPTIONS = ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "force", "verbose", "parallel")


def declared_extensions() -> list[Extension]:
    """Stands in for the libraries until they are compiled: tells setuptools that the wheel will not be pure Python."""
    return [Extension(f"{PACKAGE}._C", sources=[], py_limited_api=True)]


class BuildPy(build_py):
    """Copies the Python files into an empty build folder, so that no file of an earlier build gets into a wheel."""

    def run(self) -> None:
        """Empties the package's build folder, then copies."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Compiles the libraries by torch's own command, which exists only once torch can be imported."""

    def run(self) -> None:
        """Compiles, links and records how."""
        if importlib.util.find_spec("torch") is None:
            raise RuntimeError(
                f"building sgl_comm needs torch >= {torch_finder.MIN_TORCH_TEXT}, and there is none in this "
                "environment: install it first, or build with `pip install .`, which fetches it"
            )
        from build_tools import native

        plan = native.plan_cuda()
        self._remove_stale()
        options = {name: getattr(self, name) for name in _SHARED_OPTIONS if hasattr(self, name)}
        command = native.make_command(self.distribution, plan, options)
        command.run()
        self.extensions, self.ext_map = command.extensions, command.ext_map
        info = native.build_info(self.distribution.get_version(), plan)
        (self._output_dir() / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def _output_dir(self) -> Path:
        """The package folder the libraries end up in: the source tree's if built in place."""
        if self.inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        return Path(self.build_lib, PACKAGE)

    def _remove_stale(self) -> None:
        """Drops libraries of an earlier build: a `_C_cuda` left behind would be taken for one of this build."""
        for directory in {Path(self.build_lib, PACKAGE), self._output_dir()}:
            for path in [*directory.glob("_C*.so"), directory / BUILD_INFO]:
                path.unlink(missing_ok=True)
