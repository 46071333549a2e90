"""Every compiled kernel is loaded at init, since one that is loaded late can wait for a kernel that waits for it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from sgl_comm import _copies, _library

KERNEL = re.compile(r"^_ZN8sgl_comm6deviceL?\d+(\w+_kernel)I\w+$")
"""The name that the host's compiler gives the function by which a kernel is launched, and the kernel's own in it."""


def compiled_kernels(library: str) -> dict[int, str]:
    """Where in the library each kernel's function lies, and the kernel's name."""
    listed = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True, timeout=60)
    symbols = [line.split() for line in listed.stdout.splitlines()]
    found = {int(at, 16): match[1] for at, _, name in symbols if (match := KERNEL.match(name))}
    return found


@pytest.mark.skipif(bool(_library.cuda_missing), reason=f"no CUDA library: {_library.cuda_missing}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, which comes with a compiler")
def test_the_kernels_that_init_loads_are_all_that_there_are() -> None:
    compiled = compiled_kernels(str(_copies.library_of(_copies.HERE, "_C_cuda")))
    loaded = {at for world in range(2, 9) for at in torch.ops.sgl_comm._cuda_loaded_kernels(world)}
    forgotten = sorted({name for at, name in compiled.items() if at not in loaded})
    assert len(compiled) > 100, "the names of kernels look different"
    assert not forgotten, "not in push_kernel_table or pull_kernel_table"
    assert loaded <= compiled.keys(), "names of kernels that the pattern above does not know"
