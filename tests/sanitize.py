"""compute-sanitizer over the CUDA kernels, on simulated ranks: `python tests/sanitize.py`.

`--tools` names the tools to run, and what else is given goes to pytest. Each tool must first find the fault that is
planted for it, then nothing in tests/test_simulated.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
FOUND = 97
DEADLINE_S = 300


def sanitized(tool: str, command: list[str]) -> tuple[int, str]:
    """The exit status of the command under a tool, ``FOUND`` if that finds a fault, and what both said."""
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=5"]
    started = subprocess.Popen(
        ["compute-sanitizer", *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parent,
        start_new_session=True,
    )
    try:
        said, _ = started.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        said, _ = started.communicate()
        return -1, f"{said}\nnot done after {DEADLINE_S} s"
    return started.returncode, said


def main() -> int:
    """Runs every tool; 0 if each found its planted fault and no other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    options, arguments = parser.parse_known_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        planted = str(Path(folder, "planted_faults"))
        subprocess.run(["nvcc", "-arch=native", "-o", planted, str(TESTS / "planted_faults.cu")], check=True)
        for tool in options.tools:
            start = time.monotonic()
            fault, fault_said = sanitized(tool, [planted, tool])
            tests = [sys.executable, "-m", "pytest", "-v", str(TESTS / "test_simulated.py"), *arguments]
            status, said = sanitized(tool, tests)
            found, clean = fault == FOUND, status == 0
            failed |= not (found and clean)
            print(f"{tool}: planted fault {'found' if found else 'NOT FOUND'}", end=", ")
            print(f"kernels {'clean' if clean else 'NOT CLEAN'}", end=" ")
            summary = [line for line in said.splitlines() if "SUMMARY" in line or " passed" in line]
            print(f"({'; '.join(summary)}; {time.monotonic() - start:.0f} s)", flush=True)
            if not found:
                print(fault_said[-4000:])
            if not clean:
                print(said[-6000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
