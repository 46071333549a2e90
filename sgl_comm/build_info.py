"""How this copy of sgl_comm was built.

The build leaves a small JSON file beside the libraries. It answers what cannot be seen from them: which torch and
compilers made them, and why there is no CUDA library if there is none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sgl_comm import _copies
from sgl_comm.errors import SglCommError

RECORD = "_build_info.json"


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """Facts recorded at build time.

    Attributes:
        version: version of sgl_comm.
        torch_version: torch whose headers were compiled against.
        torch_target_version: oldest torch the libraries load in; its stable ABI is all they use.
        torch_cuda_version: CUDA version of that torch, None for a torch without CUDA.
        cxx_compiler: first line of the C++ compiler's version, None if it would not tell.
        cuda_built: whether the CUDA library `_C_cuda` was built.
        cuda_reason: why it was not, None if it was; names `SGLCOMM_BUILD_CUDA=0` if that was asked for.
        nvcc_version: version of the nvcc that was found, None if there was none.
        cuda_archs: GPU architectures compiled for (`TORCH_CUDA_ARCH_LIST` notation), None without CUDA.
    """

    version: str
    torch_version: str
    torch_target_version: str
    torch_cuda_version: str | None
    cxx_compiler: str | None
    cuda_built: bool
    cuda_reason: str | None
    nvcc_version: str | None
    cuda_archs: str | None


@cache
def build_info() -> BuildInfo:
    """Reads what the build recorded.

    Raises:
        SglCommError: there is no record beside the library, or it does not fit this version of the Python files.
    """
    folders = list(dict.fromkeys(_folders()))
    path = next((folder / RECORD for folder in folders if (folder / RECORD).is_file()), None)
    if path is None:
        looked_in = " or ".join(map(str, folders))
        raise SglCommError(
            f"sgl_comm: the record of its build is missing: no {RECORD} in {looked_in}; build it again:"
            f" {_copies.build_again()}"
        )
    try:
        return BuildInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise SglCommError(
            f"sgl_comm: {path} does not fit this version ({error}); build it again: {_copies.build_again()}"
        ) from error


def _folders() -> Iterator[Path]:
    """Where the record may be: beside the library that Python loads, or beside the file that it is a link to.

    An editable install in setuptools' strict mode links each file of the package, but not the record, into a folder of
    its own.
    """
    library = _copies.library_of(_copies.HERE)
    if library is not None:
        yield library.parent
        yield library.resolve().parent
    yield _copies.HERE
