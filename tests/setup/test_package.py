"""What importing the package does and says: environment variables, warnings, how it was built."""

from __future__ import annotations

import ast
import graphlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import sgl_comm
from helpers.programs import run_python
from sgl_comm import envs


def printed_by(code: str, **environ: str) -> str:
    """What a fresh interpreter prints, errors and warnings included."""
    done = run_python("-c", code, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


IMPORT = "import sgl_comm, torch; print('CUDA used:', torch.cuda.is_initialized())"


def test_importing_warns_about_unknown_variables_and_uses_no_gpu() -> None:
    text = printed_by(IMPORT, SGLCOMM_TIMEOUTS="3", SGLCOMM_TIMEOUT="3", XSGLCOMM_FOO="1")
    assert "CUDA used: False" in text
    assert "SGLCOMM_TIMEOUTS is set but sgl_comm has no such variable (known: " in text
    assert "SGLCOMM_TIMEOUT is set" not in text
    assert "XSGLCOMM_FOO" not in text


def test_importing_is_quiet_without_a_gpu_and_unknown_variables() -> None:
    text = printed_by(IMPORT, SGLCOMM_TIMEOUT="3", CUDA_VISIBLE_DEVICES="")
    assert "CUDA used: False" in text
    assert "SGLCOMM_" not in text


def test_old_names_work_and_say_so_once() -> None:
    code = "from sgl_comm import envs; print([envs.timeout_seconds() for _ in range(2)])"
    text = printed_by(code, SGL_COMM_TIMEOUT="7", SGL_COMM_FOO="1")
    assert "[7.0, 7.0]" in text
    assert text.count("SGL_COMM_TIMEOUT is an old name and still works; it is now SGLCOMM_TIMEOUT") == 1
    assert "SGL_COMM_FOO is set but sgl_comm has no such variable" in text
    assert "[3.0, 3.0]" in printed_by(code, SGL_COMM_TIMEOUT="7", SGLCOMM_TIMEOUT="3")


@pytest.mark.gpu
def test_importing_makes_no_cuda_context() -> None:
    code = """
import ctypes
import sgl_comm
driver = ctypes.CDLL("libcuda.so.1")
active, flags = ctypes.c_int(-1), ctypes.c_uint()
state = driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
print("used" if state == 0 and active.value != 0 else "unused")
"""
    assert printed_by(code).splitlines()[-1] == "unused"


def test_every_variable_has_a_default_and_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [variable.name for variable in envs.ALL]
    assert len(set(names)) == len(names)
    assert {"SGLCOMM_TIMEOUT", "SGLCOMM_CPU_INSTRUCTIONS", "SGLCOMM_BUILD_CUDA"} <= set(names)
    assert all(variable.meaning for variable in envs.ALL)
    monkeypatch.delenv("SGLCOMM_TIMEOUT", raising=False)
    assert envs.timeout_seconds() == 300
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "")
    assert envs.timeout_seconds() == 300
    monkeypatch.setenv("SGLCOMM_TIMEOUT", "2.5")
    assert envs.timeout_seconds() == 2.5


def test_warnings_name_what_is_known(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLCOMM_FOO", "1")
    with caplog.at_level(logging.WARNING, logger="sgl_comm"):
        envs.warn_about_names()
    assert [record.getMessage() for record in caplog.records if "SGLCOMM_FOO" in record.getMessage()]


def test_build_info_says_what_was_built() -> None:
    if not Path(sgl_comm.__file__).with_name("_build_info.json").exists():
        with pytest.raises(RuntimeError, match=r"the record of its build is missing: .* build it again: "):
            sgl_comm.build_info()
        return
    info = sgl_comm.build_info()
    assert info.version == sgl_comm.__version__
    assert info.cuda_built == (info.cuda_reason is None)
    assert re.match(r"\d+\.\d+", info.torch_target_version)


def imports_of(source: str, name: str, is_package: bool, known: Mapping[str, object]) -> set[str]:
    """The modules out of ``known`` that a module imports, wherever it does: inside functions and for type checks too.

    The packages around a module are not counted, although Python imports them before it.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) + is_package - node.level] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= names if names <= known.keys() else names | {origin}
    return (found & known.keys()) - {name}


def import_circle(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Modules of which each imports the next, and the last one is the first; none where there is no such circle."""
    graph = {name: imports_of(source, name, name in packages, sources) for name, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_module_imports_itself_through_others() -> None:
    root = Path(sgl_comm.__file__).parent
    sources, packages = {}, set()
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        sources[name] = path.read_text()
        packages |= {name} if path.name == "__init__.py" else set()
    assert {"sgl_comm", "sgl_comm.communicator", "sgl_comm.grafter", "sgl_comm.layers.communicator"} <= sources.keys()
    circle = import_circle(sources, frozenset(packages))
    assert not circle, " -> ".join(circle)


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p.a import x",
        "from p import a",
        "from .. import a",
        "from ..a import x",
        "def f():\n    from p import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import x",
    ],
)
def test_a_circle_of_imports_is_found_however_it_is_made(back: str) -> None:
    sources = {"p": "", "p.a": "from p.q import b", "p.q": "", "p.q.b": back, "p.q.c": "from p import a\nimport os"}
    packages = frozenset({"p", "p.q"})
    assert sorted(set(import_circle(sources, packages))) == ["p.a", "p.q.b"]
    assert import_circle({**sources, "p.q.b": "import os"}, packages) == []
