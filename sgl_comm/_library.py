"""Loads the compiled libraries, which registers the ops, and says why the CUDA one is missing where it is."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path

import torch

from sgl_comm.errors import SglCommError

logger = logging.getLogger(__name__)


def _load_cpu() -> None:
    try:
        importlib.import_module("sgl_comm._C")
    except ImportError as error:
        raise SglCommError(
            f"sgl_comm: its library _C cannot be loaded from {Path(__file__).parent} ({error}); in a source tree,"
            " build it with: python -m pip install -e ."
        ) from error


def _load_cuda() -> str:
    """Loads ``_C_cuda``. Returns why it is not there, or an empty text. Makes no CUDA context."""
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if importlib.util.find_spec("sgl_comm._C_cuda") is None:
        return "the package was built without CUDA (see sgl_comm.build_info())"
    try:
        importlib.import_module("sgl_comm._C_cuda")
    except ImportError as error:
        logger.warning("sgl_comm: the CUDA library is there but cannot be loaded: %s", error)
        return f"the CUDA library cannot be loaded: {error}"
    return ""


_load_cpu()
cuda_missing: str = _load_cuda()
"""Why there are no CUDA kernels; empty where there are."""
