"""The setuptools commands of this project. Cheap to import: metadata and sdists are made without compiling."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_tools import native

PACKAGE = "sgl_comm"
BUILD_INFO = "_build_info.json"


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
    """Compiles the libraries by ninja (`build_tools/native.py`) and puts them where setuptools wants them."""

    def run(self) -> None:
        """Compiles; then installs, when all has succeeded."""
        built = native.compile_libraries(self.distribution.get_version())
        self._names = [path.name for path in native.install(built, self._output_dir(), BUILD_INFO)]

    def _output_dir(self) -> Path:
        """The package folder the libraries end up in: the source tree's if built in place."""
        if self.inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        return Path(self.build_lib, PACKAGE)

    def get_outputs(self) -> list[str]:
        """The files of a wheel."""
        return [str(Path(self.build_lib, PACKAGE, name)) for name in getattr(self, "_names", [])]

    def get_output_mapping(self) -> dict[str, str]:
        """Files of a wheel -> where they are instead, built in place."""
        if not self.inplace:
            return {}
        return {path: str(self._output_dir() / Path(path).name) for path in self.get_outputs()}

    def get_source_files(self) -> list[str]:
        """None: MANIFEST.in lists them."""
        return []
