"""Builds sgl_comm: `_C` always, `_C_cuda` where nvcc and torch allow it.

`build_tools/settings.py` has the environment variables, `build_tools/ninja_file.py` the flags.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools.commands import BuildExt, BuildPy, declared_extensions

setup(
    license="Apache-2.0",
    ext_modules=declared_extensions(),
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    # One wheel for every Python from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
