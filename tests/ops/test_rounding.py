"""The CUDA norm's division and square root are rounded as the compiler's own are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_division_and_square_root_are_correctly_rounded(tmp_path: Path) -> None:
    program = str(tmp_path / "rounding")
    source, headers = str(HERE / "rounding.cu"), str(HERE.parents[1] / "csrc")
    subprocess.run(["nvcc", "-O3", "-arch=native", "-I", headers, "-o", program, source], check=True, timeout=120)
    run = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
