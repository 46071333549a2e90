"""Which GPUs the driver shows, and whether a build's architectures serve them. Makes no CUDA context.

The driver's management library (NVML) is asked, for CUDA itself cannot be without a context of the runtime. Where it is
missing, or strange, there is no answer and no error.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_ARCH = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number in the order of the bus, its name, and its compute capability."""

    index: int
    name: str
    capability: tuple[int, int]


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures has code that a GPU of this capability runs.

    Args:
        archs: in the words of ``TORCH_CUDA_ARCH_LIST``. Of "9.0" there is machine code, which runs on the same major
            version from that minor one on; "9.0+PTX" also has what the driver compiles for every later GPU; "9.0a"
            runs on that capability alone; "10.0f" within the major version, from that minor one on. A word that is
            none of these, such as "Hopper", counts as one that serves.
    """
    return any(_arch_covers(arch, capability) for arch in re.split(r"[;\s]+", archs.strip()))


def _arch_covers(arch: str, capability: tuple[int, int]) -> bool:
    match = _ARCH.fullmatch(arch)
    if match is None:
        return True
    own = int(match[1]), int(match[2])
    if match[3] == "a":
        return capability == own
    if match[4] and not match[3] and capability >= own:
        return True
    return capability[0] == own[0] and capability[1] >= own[1]


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu] | None:
    """Those of the GPUs that CUDA shows this process; None where that is not simple to tell."""
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(gpus)
    numbers = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"-?\d+", number) for number in numbers):
        return None
    # CUDA numbers the fastest first, unless it is told to go by the bus.
    mixed = len({gpu.capability for gpu in gpus}) > 1
    if numbers and mixed and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    found = []
    for number in map(int, numbers):
        if not 0 <= number < len(gpus):
            break  # as CUDA does
        found.append(gpus[number])
    return found


def all_gpus() -> list[Gpu]:
    """What the driver shows, in the order of the bus; nothing where it cannot be asked."""
    try:
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:
            return []
        try:
            count = ctypes.c_uint()
            if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
                return []
            return [_gpu(nvml, index) for index in range(count.value)]
        finally:
            nvml.nvmlShutdown()
    except (AttributeError, OSError, ValueError):
        return []


def _gpu(nvml: Any, index: int) -> Gpu:
    """One of them.

    Raises:
        ValueError: the library does not tell.
    """
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        raise ValueError(f"no handle of GPU {index}")
    if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0:
        raise ValueError(f"no compute capability of GPU {index}")
    name = ctypes.create_string_buffer(_NAME_BYTES)
    known = nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES)) == 0
    words = name.value.decode(errors="replace") if known else "name unknown"
    return Gpu(index, words, (major.value, minor.value))
