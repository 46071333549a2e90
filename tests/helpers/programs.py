"""Programs as users start them: in a process of its own, with the package that is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import sgl_comm
from sgl_comm import envs

PACKAGE_PARENT = Path(sgl_comm.__file__).parents[1]
DEADLINE_S = 120.0
_PREFIXES = (envs.PREFIX, envs.OLD_PREFIX)


def environment(**changes: str | None) -> dict[str, str]:
    """A user's: without a launcher's variables and the package's own. A change to None takes a variable away."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIXES)}
    changed = {**kept, "PYTHONPATH": str(PACKAGE_PARENT), "RANK": None, "WORLD_SIZE": None, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def run_python(*args: str, cwd: Path | None = None, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in ``environment(**changes)``."""
    command, env = [sys.executable, *args], environment(**changes)
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=cwd, env=env)


def run_benchmark(script: ModuleType, folder: Path, *options: str) -> tuple[str, list[str], dict[str, Any]]:
    """A script of ``benchmarks/`` between two CPU processes: the heads and the rows of its table, and its JSON."""
    file = folder / "figures.json"
    done = run_python(str(script.__file__), "--device", "cpu", "--iters", "2", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    heads, *rows = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return heads, rows, json.loads(file.read_text())
