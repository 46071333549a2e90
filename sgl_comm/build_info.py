"""How this copy of sgl_comm was built.

The build leaves a small JSON file beside the libraries. It answers what cannot be seen from them: which torch and
compilers made them, and why there is no CUDA library if there is none.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

_PATH = Path(__file__).with_name("_build_info.json")


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
        cuda_reason: why it was not, None if it was.
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
        RuntimeError: the package was not built (a source tree without an editable install), or its record does not
            fit this version of the Python files.
    """
    try:
        fields = json.loads(_PATH.read_text(encoding="utf-8"))
        return BuildInfo(**fields)
    except FileNotFoundError:
        raise RuntimeError(
            f"sgl_comm is not built: {_PATH} is missing. Run `pip install .` or `pip install -e .` in the project; "
            "when it is installed already, leave the project's folder, whose source hides the installed package."
        ) from None
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"sgl_comm: {_PATH} does not fit this version, build the package again: {error}") from error
