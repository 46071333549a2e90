"""A benchmark's script as its users start it, between two CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import sgl_comm


def run_benchmark(script: ModuleType, folder: Path, *options: str) -> tuple[str, list[str], dict[str, Any]]:
    """The heads and the rows of its table, and its JSON."""
    file = folder / "figures.json"
    command = [sys.executable, str(script.__file__), "--device", "cpu", "--iters", "2", *options, "--json", str(file)]
    environ = os.environ | {"PYTHONPATH": str(Path(sgl_comm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    heads, *rows = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return heads, rows, json.loads(file.read_text())
