"""Checks a wheel: `check_wheel.py WHEEL`. One file for every Python and torch, nothing of the build machine in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Either would tie the library to one Python or one CUDA minor version.
FORBIDDEN_LIBRARIES = ("libcudart", "libtorch_python", "libpython")


def expect(condition: bool, message: str) -> None:
    """Ends the run with the message unless the condition holds."""
    if not condition:
        raise SystemExit(f"check_wheel: {message}")


def check_names(wheel: Path, names: list[str], cuda_built: bool) -> None:
    """The tag says abi3; the contents are the package and its metadata, with the libraries and without tests."""
    expect("-cp310-abi3-" in wheel.name, f"got {wheel.name}, expected the tag cp310-abi3")
    outside = [name for name in names if not re.match(r"sgl_comm(-[^/]*\.dist-info)?/", name)]
    expect(not outside, f"files outside the package: {outside}")
    expect(not [name for name in names if "/tests/" in name or "/test_" in name], "the wheel contains tests")
    expect(not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh"))], "the wheel contains sources")
    libraries = {name for name in names if ".so" in name}
    wanted = {"sgl_comm/_C.abi3.so"} | ({"sgl_comm/_C_cuda.abi3.so"} if cuda_built else set())
    expect(libraries == wanted, f"libraries: got {sorted(libraries)}, expected {sorted(wanted)}")
    expect("sgl_comm/py.typed" in names, "py.typed is missing")


def check_requirements(metadata: str) -> None:
    """torch is the one thing needed at run time."""
    required = [
        line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE) if "extra ==" not in line
    ]
    expect(required == ["torch>2.10.99"], f"runtime requirements: got {required}, expected torch>2.10.99 alone")


def check_library(path: Path) -> None:
    """No search path of the build machine, no dependency that would narrow where the library loads."""
    dynamic = subprocess.run(["readelf", "-d", "-W", str(path)], capture_output=True, text=True, check=True).stdout
    expect("RPATH" not in dynamic and "RUNPATH" not in dynamic, f"{path.name} has a library search path:\n{dynamic}")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    bad = [name for name in needed if name.startswith(FORBIDDEN_LIBRARIES)]
    expect(not bad, f"{path.name} depends on {bad}")
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, needs {' '.join(needed)}")


def main(wheel: Path) -> None:
    """Runs every check."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        names = archive.namelist()
        expect("sgl_comm/_build_info.json" in names, "the wheel has no build record")
        info = json.loads(archive.read("sgl_comm/_build_info.json"))
        check_names(wheel, names, info["cuda_built"])
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        check_requirements(archive.read(metadata).decode())
        if shutil.which("readelf") is None:
            print("check_wheel: no readelf here, the libraries were not looked at")
        else:
            for name in names:
                if name.endswith(".so"):
                    check_library(Path(archive.extract(name, directory)))
    print(f"{wheel.name}: CUDA {'built' if info['cuda_built'] else 'left out: ' + info['cuda_reason']}")


if __name__ == "__main__":
    expect(len(sys.argv) == 2, "usage: check_wheel.py WHEEL")
    main(Path(sys.argv[1]))
