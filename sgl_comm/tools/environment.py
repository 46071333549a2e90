"""What a measurement ran on."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import torch

import sgl_comm


def environment() -> dict[str, str | int | None]:
    """Facts that a reader of a measurement needs: processor, cores, GPUs, versions. Keys are stable."""
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count() if has_gpu else 0,
        "gpu": torch.cuda.get_device_name(0) if has_gpu else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sgl_comm": sgl_comm.__version__,
        "build": _build(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _build() -> str:
    try:
        facts = dataclasses.asdict(sgl_comm.build_info())
    except RuntimeError:
        return "not recorded"
    return ", ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
