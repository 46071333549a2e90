"""What the import says of a copy without a library, of a torch that is too old, of what the build left out, of GPUs."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sgl_comm
from sgl_comm import _build_notes, _copies, _gpu_archs, _library, build_info
from sgl_comm._gpu_archs import Gpu

PACKAGE = Path(sgl_comm.__file__).parent
EDITABLE = "python -m pip install -e "
RECORD: dict[str, Any] = {
    "version": "0.1.0", "torch_version": "2.11.0", "torch_target_version": "2.11", "torch_cuda_version": "13.0",
    "cxx_compiler": None, "cuda_built": False, "cuda_reason": "nvcc was not found", "nvcc_version": None,
    "cuda_archs": None,
}  # fmt: skip


def make_copy(folder: Path, library: bytes | None = None, source: bool = False) -> Path:
    """A copy of the package's Python files in a folder, as a source folder or as pip installs them."""
    target = folder / "sgl_comm"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("_C*", "*.json", "__pycache__"))
    if library is not None:
        (target / "_C.abi3.so").write_bytes(library)
        (target / "_build_info.json").write_text(json.dumps(RECORD))
    if source:
        (folder / "csrc").mkdir()
        (folder / "pyproject.toml").touch()
    return folder


def note_install(folder: Path, source: Path, editable: bool) -> Path:
    """pip's notes on where it has installed the package from."""
    notes = folder / "sgl_comm-0.1.0.dist-info"
    notes.mkdir(parents=True)
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: sgl_comm\nVersion: 0.1.0\n")
    (notes / "direct_url.json").write_text(
        json.dumps({"url": source.as_uri(), "dir_info": {"editable": True} if editable else {}})
    )
    return folder


def make_torch(folder: Path, version: str) -> Path:
    """As much of a torch as is looked at before the library is loaded."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


def complaint(cwd: Path, *search_path: Path) -> str:
    """The last line of what ``import sgl_comm`` ends with, in an interpreter that sees these folders alone."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search_path))}
    command = [sys.executable, "-S", "-c", "import sgl_comm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=cwd)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sgl_comm.errors.SglCommError: sgl_comm: "), done.stderr
    return last.removeprefix("sgl_comm.errors.SglCommError: sgl_comm: ")


def test_a_source_folder_without_a_library(tmp_path: Path) -> None:
    source = make_copy(tmp_path / "source", source=True)
    in_place = f"{EDITABLE}{source}"
    assert complaint(source) == (
        f"it is not built: the source folder {source} has no library, and no other copy is installed; build it in"
        f" place: {in_place}"
    )
    site = make_copy(tmp_path / "site", library=b"")
    hides = f"the source folder {source}, which has no library of its own, hides the installed package {site}/sgl_comm"
    assert complaint(source, site) == (
        f"{hides}; run Python from another folder, or build the library in place: {in_place}"
    )
    assert complaint(tmp_path, source, site) == (
        f"{hides}; take {source} off the search path (PYTHONPATH, or the folder of the script that runs), or build the"
        f" library in place: {in_place}"
    )
    editable = note_install(tmp_path / "editable", source, editable=True)
    assert complaint(source, editable) == (
        f"it is installed from {source} as editable, but its library _C is gone from {source}/sgl_comm; build it again:"
        f" {in_place}"
    )
    other = make_copy(tmp_path / "other", library=b"", source=True)
    elsewhere = note_install(tmp_path / "elsewhere", other, editable=True)
    assert f"hides the installed package {other}/sgl_comm; run " in complaint(source, elsewhere)
    assert "it is not built" in complaint(source, note_install(tmp_path / "wheel", source, editable=False))


def test_links_to_a_source_folder_whose_library_is_gone(tmp_path: Path) -> None:
    source = make_copy(tmp_path / "source", source=True)
    links = tmp_path / "source" / "build" / "links"
    shutil.copytree(source / "sgl_comm", links / "sgl_comm", copy_function=lambda path, link: os.symlink(path, link))
    (links / "sgl_comm" / "_C.abi3.so").symlink_to(source / "sgl_comm" / "_C.abi3.so")
    editable = note_install(tmp_path / "editable", source, editable=True)
    assert complaint(tmp_path, links, editable) == (
        f"it is installed from {source} as editable, but its library _C is gone from {links}/sgl_comm; build it again:"
        f" {EDITABLE}{source}"
    )


def test_an_installed_copy_without_a_library_for_this_python(tmp_path: Path) -> None:
    site = make_copy(tmp_path / "site")
    assert complaint(tmp_path, site) == (
        f"its library _C is missing from {site}/sgl_comm, so the installation is not whole; build it again:"
        f" {_copies.BUILD_AGAIN} . (in the source folder of sgl_comm)"
    )
    (tmp_path / "a source").mkdir()
    note_install(site, tmp_path / "a source", editable=False)
    assert complaint(tmp_path, site).endswith(f": {_copies.BUILD_AGAIN} '{tmp_path}/a source'")
    (site / "sgl_comm" / "_C.cpython-27.so").touch()
    assert f"{site}/sgl_comm has _C.cpython-27.so, which this Python (" in complaint(tmp_path, site)


def test_a_torch_that_is_too_old_is_named_before_the_library_is_loaded(tmp_path: Path) -> None:
    site = make_copy(tmp_path / "site", library=b"no library at all")
    old = make_torch(tmp_path / "old", "2.10.0+cu128")
    assert complaint(tmp_path, site, old) == (
        f"got torch 2.10.0+cu128 ({old}/torch); expected torch >= 2.11, which {site}/sgl_comm was built for; install a"
        " newer one: python -m pip install --upgrade 'torch>=2.11'"
    )
    new = make_torch(tmp_path / "new", "2.11.0a0+abc.nv26.2")
    text = complaint(tmp_path, site, new)
    assert f"its library {site}/sgl_comm/_C.abi3.so cannot be loaded beside torch 2.11.0a0+abc.nv26.2: " in text
    assert "file too short" in text or "invalid ELF header" in text
    assert " (it was built against torch 2.11.0); build it again on this machine: " in text


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("2.10.0+cu128", True),
        ("2.9", True),
        ("1.13.1", True),
        ("2.11.0", False),
        ("2.11", False),
        ("2.11.0a0+abc.nv26.2", False),
        ("2.11.0.dev2026", False),
        ("2.11a0", False),
        ("2.12.0rc1", False),
        ("3.0", False),
        ("3", False),
        ("2", True),
        ("git-1234", False),
    ],
)
def test_which_torch_is_older(version: str, older: bool) -> None:
    assert _library.is_older(version, "2.11") is older


def test_the_record_is_found_beside_the_library_and_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_copy(tmp_path / "source", library=b"", source=True) / "sgl_comm"
    links = tmp_path / "links"
    shutil.copytree(source, links, copy_function=lambda path, link: os.symlink(path, link))
    (links / "_build_info.json").unlink()
    monkeypatch.setattr(_copies, "HERE", links)
    read = build_info.__wrapped__
    assert read().cuda_reason == "nvcc was not found"
    (links / "_build_info.json").write_text(json.dumps(RECORD | {"cuda_reason": "its own"}))
    assert read().cuda_reason == "its own"
    for name in (links, source):
        (name / "_build_info.json").unlink()
    with pytest.raises(sgl_comm.SglCommError, match=f"no _build_info.json in {links} or {source}; build it again: "):
        read()
    (source / "_build_info.json").write_text("{}")
    with pytest.raises(sgl_comm.SglCommError, match=f"{source}/_build_info.json does not fit this version"):
        read()


def info(**changes: Any) -> sgl_comm.BuildInfo:
    return sgl_comm.BuildInfo(**(RECORD | changes))


def left_out(reason: str, **changes: Any) -> _build_notes.Note:
    given = {"torch_cuda": "13.0", "has_gpu": True, "wanted": False, "command": "COMMAND"} | changes
    return _build_notes.left_out(info(cuda_reason=reason), **given)


def test_what_was_left_out_is_told_where_it_matters() -> None:
    note = left_out("nvcc was not found")
    assert note.level == logging.WARNING
    assert note.text == (
        "sgl_comm: this copy has no CUDA kernels; they were left out of the build (nvcc was not found). NCCL or gloo"
        " serves GPUs. To build them, with an nvcc of torch's CUDA (13.0): SGLCOMM_BUILD_CUDA=1 COMMAND (it ends with"
        " what is missing, if anything is)"
    )
    assert left_out("nvcc was not found", has_gpu=False).level == logging.INFO
    assert left_out("this torch is not a CUDA build", torch_cuda=None).level == logging.INFO
    assert left_out("SGLCOMM_BUILD_CUDA=0 was set").level == logging.INFO
    wanted = left_out("SGLCOMM_BUILD_CUDA=0 was set", wanted=True, has_gpu=False)
    assert wanted.level == logging.WARNING
    assert wanted.text == (
        "sgl_comm: SGLCOMM_BUILD_CUDA=1 is set but this copy was built without CUDA (SGLCOMM_BUILD_CUDA=0 was set); pip"
        " may have taken a wheel from its cache: COMMAND"
    )


@pytest.mark.parametrize(
    ("archs", "served", "not_served"),
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("8.0;9.0+PTX", ["8.0", "8.9", "9.0", "10.0", "12.0"], ["7.5"]),
        ("8.0 9.0", ["8.6", "9.0"], ["10.0"]),
        ("9.0+PTX;8.0", ["8.0", "12.1"], ["7.0"]),
        ("9.0a", ["9.0"], ["8.0", "10.0"]),
        ("9.0a+PTX", ["9.0"], ["10.0"]),
        ("10.0f", ["10.0", "10.3"], ["9.0", "11.0", "12.0"]),
        ("10.3f", ["10.3"], ["10.0", "12.0"]),
        ("10.0f+PTX", ["10.0", "10.3"], ["12.0"]),
        ("Hopper", ["9.0", "7.0"], []),
        ("8.0;native", ["12.0"], []),
    ],
)
def test_which_gpus_a_build_serves(archs: str, served: list[str], not_served: list[str]) -> None:
    for expected, capabilities in ((True, served), (False, not_served)):
        for text in capabilities:
            major, minor = map(int, text.split("."))
            assert _gpu_archs.covers(archs, (major, minor)) is expected, text


H200, OLD, NEW = Gpu(0, "H200", (9, 0)), Gpu(1, "T4", (7, 5)), Gpu(2, "RTX 5090", (12, 0))


def test_gpus_that_are_not_served_are_named() -> None:
    assert _build_notes.not_covered("8.0;9.0+PTX", [H200, NEW], "COMMAND") is None
    assert _build_notes.not_covered("8.0", [], "COMMAND") is None
    note = _build_notes.not_covered("8.0;9.0", [H200, OLD, NEW], "COMMAND")
    assert note == _build_notes.Note(
        logging.WARNING,
        "sgl_comm: its CUDA kernels were built for compute capability 8.0;9.0, which does not cover every GPU here:"
        " GPU 1 (T4) has 7.5, GPU 2 (RTX 5090) has 12.0. Build them for all:"
        " TORCH_CUDA_ARCH_LIST='8.0;9.0;7.5;12.0' COMMAND",
    )


def test_which_gpus_cuda_shows() -> None:
    alike = [H200, Gpu(1, "H200", (9, 0))]
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert _gpu_archs.visible(alike, {}) == alike
    assert _gpu_archs.visible(alike, {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert _gpu_archs.visible(alike, {"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert _gpu_archs.visible(alike, {"CUDA_VISIBLE_DEVICES": "1, 0"}) == alike[::-1]
    assert _gpu_archs.visible(alike, {"CUDA_VISIBLE_DEVICES": "1,7,0"}) == alike[1:]
    assert _gpu_archs.visible(alike, {"CUDA_VISIBLE_DEVICES": "GPU-8c1f"}) is None
    mixed = [H200, OLD]
    assert _gpu_archs.visible(mixed, {"CUDA_VISIBLE_DEVICES": "1"}) is None, "the fastest first"
    assert _gpu_archs.visible(mixed, {"CUDA_VISIBLE_DEVICES": "1", **by_bus}) == [OLD]
    assert _gpu_archs.visible(mixed, {"CUDA_VISIBLE_DEVICES": "", **by_bus}) == []


class Nvml:
    """The driver's management library with two GPUs; ``fails`` gives an error, ``lacks`` is not there."""

    def __init__(self, fails: str = "", lacks: str = "") -> None:
        self.fails, self.lacks, self.open = fails, lacks, 0

    def __getattr__(self, name: str) -> Any:
        if name == self.lacks:
            raise AttributeError(name)
        return lambda *args: 999 if name == self.fails else self.answer(name, *args)

    def answer(self, name: str, *args: Any) -> int:
        if name in ("nvmlInit_v2", "nvmlShutdown"):
            self.open += 1 if name == "nvmlInit_v2" else -1
        elif name == "nvmlDeviceGetCount_v2":
            args[0]._obj.value = 2
        elif name == "nvmlDeviceGetHandleByIndex_v2":
            args[1]._obj.value = 1000 + args[0].value
        elif name == "nvmlDeviceGetCudaComputeCapability":
            args[1]._obj.value, args[2]._obj.value = (9, 0) if args[0].value == 1000 else (12, 0)
        elif name == "nvmlDeviceGetName":
            args[1].value = b"GPU of %d" % args[0].value
        return 0


def test_the_driver_is_asked_and_never_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    found = [Gpu(0, "GPU of 1000", (9, 0)), Gpu(1, "GPU of 1001", (12, 0))]
    assert _gpu_archs.all_gpus() == found
    library = Nvml(fails="nvmlDeviceGetName")
    assert [gpu.name for gpu in _gpu_archs.all_gpus()] == ["name unknown"] * 2
    for name in (
        "nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability",
    ):  # fmt: skip
        for library in (Nvml(fails=name), Nvml(lacks=name)):
            assert _gpu_archs.all_gpus() == []
            assert library.open == 0

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert _gpu_archs.all_gpus() == []


FAKE_NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) { *handle = handle; return index; }
int nvmlDeviceGetCudaComputeCapability(void* gpu, int* major, int* minor) { *major = 12; *minor = 0; return 0; }
int nvmlDeviceGetName(void* gpu, char* name, unsigned size) { name[0] = 'X'; name[1] = 0; return 0; }
"""
IMPORT = """
import logging
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
import sgl_comm, torch
print("CUDA used:", torch.cuda.is_initialized(), sgl_comm._library.cuda_missing)
import os
os.environ["SGLCOMM_BUILD_CUDA"] = "1"
sgl_comm._build_notes.tell()
sgl_comm._library.cuda_missing = ""
sgl_comm._build_notes.build_info = lambda: sgl_comm.BuildInfo(**{**vars(sgl_comm.build_info()), **CHANGES})
sgl_comm._build_notes.tell()
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no cc to build a driver library with")
def test_an_import_tells_once_and_makes_no_cuda_context(tmp_path: Path) -> None:
    site = make_copy(tmp_path / "site", library=b"")
    library = _copies.library_of(PACKAGE)
    assert library is not None
    (site / "sgl_comm" / "_C.abi3.so").unlink()
    (site / "sgl_comm" / library.name).symlink_to(library)
    (tmp_path / "nvml.c").write_text(FAKE_NVML)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libnvidia-ml.so.1"), str(tmp_path / "nvml.c")]
    subprocess.run(command, check=True, timeout=60)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SGL", "CUDA_"))}
    environ |= {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(tmp_path)}
    code = IMPORT.replace("CHANGES", repr({"cuda_built": True, "cuda_reason": None, "cuda_archs": "8.0;9.0a"}))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environ, cwd=tmp_path
    )
    assert done.stdout == "CUDA used: False the package was built without CUDA (nvcc was not found)\n", done.stderr
    imported, wanted, archs = [line for line in done.stderr.splitlines() if " sgl_comm " in line]
    assert imported.startswith("WARNING sgl_comm sgl_comm: this copy has no CUDA kernels; they were left out of the")
    assert imported.count("(nvcc was not found)") == 1
    assert wanted.startswith("WARNING sgl_comm sgl_comm: SGLCOMM_BUILD_CUDA=1 is set but this copy was built without")
    assert _copies.BUILD_AGAIN in wanted
    assert "compute capability 8.0;9.0a, which does not cover every GPU here: GPU 0 (X) has 12.0. Build" in archs
