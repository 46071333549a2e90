"""Loads the compiled libraries, which registers the ops, and says why one is missing or cannot be loaded.

The package imports this before all else: what comes after it needs a torch that is new enough.
"""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path

from sgl_comm import _copies
from sgl_comm.build_info import build_info
from sgl_comm.errors import SglCommError

logger = logging.getLogger(__name__)


def is_older(version: str, needed: str) -> bool:
    """Whether a torch is older than needed; a pre-release counts as its release, and what cannot be read as new."""
    numbers = [re.match(r"\d+(?:\.\d+)*", text) for text in (version, needed)]
    if None in numbers:
        return False
    own, least = ([int(number) for number in match[0].split(".")] for match in numbers if match)
    return (own + [0] * len(least))[: len(least)] < least


def _load_cpu() -> None:
    file = _copies.library_of(_copies.HERE)
    if file is None:
        raise SglCommError(_copies.why_no_library())
    import torch

    _must_be_new_enough(str(torch.__version__), torch.__file__)
    try:
        importlib.import_module("sgl_comm._C")
    except ImportError as error:
        raise SglCommError(
            f"sgl_comm: its library {file} cannot be loaded beside torch {torch.__version__}: {error}{_built()}; build"
            f" it again on this machine: {_copies.build_again()}"
        ) from error


def _must_be_new_enough(version: str, file: str | None) -> None:
    try:
        needed = build_info().torch_target_version
    except RuntimeError:
        return  # then loading the library shows it
    if is_older(version, needed):
        raise SglCommError(
            f"sgl_comm: got torch {version} ({Path(file or '').parent}); expected torch >= {needed}, which"
            f" {_copies.HERE} was built for; install a newer one: python -m pip install --upgrade 'torch>={needed}'"
        )


def _built() -> str:
    try:
        return f" (it was built against torch {build_info().torch_version})"
    except RuntimeError:
        return ""


def _load_cuda() -> str:
    """Loads ``_C_cuda``. Returns why it is not there, or an empty text. Makes no CUDA context."""
    import torch

    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if _copies.library_of(_copies.HERE, "_C_cuda") is None:
        return f"the package was built without CUDA ({_why_left_out()})"
    try:
        importlib.import_module("sgl_comm._C_cuda")
    except ImportError as error:
        logger.warning(
            "sgl_comm: the CUDA library is there but cannot be loaded beside torch %s: %s%s; build it again on this"
            " machine: %s", torch.__version__, error, _built(), _copies.build_again(),
        )  # fmt: skip
        return f"the CUDA library cannot be loaded: {error}"
    return ""


def _why_left_out() -> str:
    try:
        return build_info().cuda_reason or "its CUDA library has been removed since"
    except RuntimeError:
        return "see sgl_comm.build_info()"


_load_cpu()
cuda_missing: str = _load_cuda()
"""Why there are no CUDA kernels; empty where there are."""
