"""What the import says, once, of how this copy was built: what was left out and why, and GPUs that it does not serve.

pip hides what the build prints, so this is the first that a user hears of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_comm import _copies, _gpu_archs, _library, envs
from sgl_comm._gpu_archs import Gpu
from sgl_comm.build_info import BuildInfo, build_info

logger = logging.getLogger("sgl_comm")


@dataclass(frozen=True)
class Note:
    """One line for the log."""

    level: int
    text: str


def tell() -> None:
    """Logs the notes on this copy, this torch and these GPUs. Makes no CUDA context."""
    try:
        info = build_info()
    except RuntimeError:
        return
    gpus = _gpu_archs.all_gpus() if torch.version.cuda is not None else []
    seen = _gpu_archs.visible(gpus, os.environ)
    wanted = envs.BUILD_CUDA.given() == "1"
    command = _copies.build_again()
    if not info.cuda_built:
        note: Note | None = left_out(info, torch.version.cuda, bool(gpus) and seen != [], wanted, command)
    elif not _library.cuda_missing and info.cuda_archs:
        note = not_covered(info.cuda_archs, seen or [], command)
    else:
        note = None  # the library, when it was loaded, has said what there is to say
    if note is not None:
        logger.log(note.level, "%s", note.text)


def left_out(info: BuildInfo, torch_cuda: str | None, has_gpu: bool, wanted: bool, command: str) -> Note:
    """On a build without CUDA.

    Args:
        torch_cuda: the CUDA version of the torch at hand.
        has_gpu: whether there is a GPU that CUDA shows.
        wanted: whether the environment asks for CUDA now.
        command: builds the package again.
    """
    reason = info.cuda_reason or "no reason was noted"
    if wanted:
        return Note(
            logging.WARNING,
            f"sgl_comm: {envs.BUILD_CUDA.name}=1 is set but this copy was built without CUDA ({reason}); pip may have"
            f" taken a wheel from its cache: {command}",
        )
    text = f"sgl_comm: this copy has no CUDA kernels; they were left out of the build ({reason})."
    if torch_cuda is None:
        text += " They need a torch that is a CUDA build."
    else:
        text += (
            f" NCCL or gloo serves GPUs. To build them, with an nvcc of torch's CUDA ({torch_cuda}):"
            f" {envs.BUILD_CUDA.name}=1 {command} (it ends with what is missing, if anything is)"
        )
    asked_for = f"{envs.BUILD_CUDA.name}=0" in reason
    level = logging.WARNING if torch_cuda is not None and has_gpu and not asked_for else logging.INFO
    return Note(level, text)


def not_covered(archs: str, gpus: Sequence[Gpu], command: str) -> Note | None:
    """On GPUs that a build for these architectures has no code for."""
    others = [gpu for gpu in gpus if not _gpu_archs.covers(archs, gpu.capability)]
    if not others:
        return None
    names = ", ".join(f"GPU {gpu.index} ({gpu.name}) has {gpu.capability[0]}.{gpu.capability[1]}" for gpu in others)
    missing = [f"{major}.{minor}" for major, minor in sorted({gpu.capability for gpu in others})]
    text = (
        f"sgl_comm: its CUDA kernels were built for compute capability {archs}, which does not cover every GPU here:"
        f" {names}. Build them for all: TORCH_CUDA_ARCH_LIST='{';'.join([archs, *missing])}' {command}"
    )
    return Note(logging.WARNING, text)
