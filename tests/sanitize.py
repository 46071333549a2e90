"""compute-sanitizer over the CUDA kernels, on simulated ranks: `python tests/sanitize.py [pytest arguments]`.

Each tool must first find the fault that is planted for it, then nothing in tests/test_simulated.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
FOUND = 97
DEADLINE_S = 300


def sanitized(tool: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command under a tool; exit status ``FOUND`` if that finds a fault."""
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=5"]
    return subprocess.run(
        ["compute-sanitizer", *options, *command], capture_output=True, text=True, timeout=DEADLINE_S, cwd=TESTS.parent
    )


def main(arguments: list[str]) -> int:
    """Runs every tool; 0 if each found its planted fault and no other."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        planted = str(Path(folder, "planted_faults"))
        subprocess.run(["nvcc", "-arch=native", "-o", planted, str(TESTS / "planted_faults.cu")], check=True)
        for tool in TOOLS:
            start = time.monotonic()
            fault = sanitized(tool, [planted, tool])
            tests = sanitized(
                tool, [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_simulated.py"), *arguments]
            )
            found, clean = fault.returncode == FOUND, tests.returncode == 0
            failed |= not (found and clean)
            said = [line for line in tests.stdout.splitlines() if "SUMMARY" in line or " passed" in line]
            print(f"{tool}: planted fault {'found' if found else 'NOT FOUND'}", end=", ")
            print(f"kernels {'clean' if clean else 'NOT CLEAN'}", end=" ")
            print(f"({'; '.join(said)}; {time.monotonic() - start:.0f} s)", flush=True)
            if not found:
                print(fault.stdout[-2000:] + fault.stderr[-2000:])
            if not clean:
                print(tests.stdout[-4000:] + tests.stderr[-2000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
