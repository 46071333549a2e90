"""compute-sanitizer over the CUDA kernels, on simulated ranks: `python tests/sanitize.py`.

`--tools` names the tools to run (default: all), and what else is given goes to pytest. Each tool must first find the
fault that is planted for it, then nothing in tests/ops/test_simulated.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
OURS = "--kernel-name=kns=sgl_comm"
"""No kernel of PyTorch is instrumented. Not where a tool must also know what those have written."""
TOOLS = {"memcheck": (), "initcheck": (), "synccheck": (OURS,), "racecheck": (OURS,)}
"""The options of each."""
ENVIRONMENT = {"SGLCOMM_TIMEOUT": "20", "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""With the tool's own streams, those of eight ranks do not fit into the usual eight queues: two ranks would share one,
and wait for each other."""
FOUND = 97
DEADLINE_S = 300


def sanitized(tool: str, command: list[str]) -> tuple[int, list[str]]:
    """The exit status of a command under a tool, ``FOUND`` if that finds a fault; and its lines, shown as they come."""
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=5", *TOOLS[tool]]
    run = subprocess.Popen(
        ["compute-sanitizer", *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    end = threading.Timer(DEADLINE_S, os.killpg, (run.pid, signal.SIGKILL))
    end.start()
    lines = []
    for line in run.stdout or ():
        lines.append(line.rstrip())
        print(f"  {lines[-1]}", flush=True)
    end.cancel()
    return run.wait(), lines


def main() -> int:
    """Runs every tool; 0 if each found its planted fault and no other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    options, arguments = parser.parse_known_args()
    tests = [sys.executable, "-m", "pytest", "-v", str(TESTS / "ops" / "test_simulated.py")]
    verdicts, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        planted = str(Path(folder, "planted_faults"))
        subprocess.run(["nvcc", "-arch=native", "-o", planted, str(TESTS / "planted_faults.cu")], check=True)
        for tool in options.tools:
            start = time.monotonic()
            found = sanitized(tool, [planted, tool])[0] == FOUND
            status, lines = sanitized(tool, [*tests, *arguments])
            summary = [line for line in lines if "SUMMARY" in line or " passed" in line]
            clean = status == 0 and any(" passed" in line for line in summary)
            verdicts.append(
                f"{tool}: planted fault {'found' if found else 'NOT FOUND'}, kernels"
                f" {'clean' if clean else 'NOT CLEAN'} ({'; '.join(summary)}; {time.monotonic() - start:.0f} s)"
            )
            print(verdicts[-1], flush=True)
            failed |= not (found and clean)
    print("\n".join(verdicts))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
