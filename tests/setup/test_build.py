"""How the package is built: what the environment may say, which torch is found, what is compiled anew and what not.

The last half compiles a project of two little files for real, by the same code as the package's own libraries.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
from setuptools import Distribution

from build_tools import backend, native, ninja_file, settings, toolchain, torch_finder, torch_headers

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120


# What the environment may say.

WRONG = [
    ("SGLCOMM_BUILD_CUDA", "yes"),
    ("SGLCOMM_BUILD_CUDA", ""),
    ("SGL_COMM_BUILD_CUDA", "yes"),
    ("TORCH_CUDA_ARCH_LIST", ""),
    ("TORCH_CUDA_ARCH_LIST", " ; "),
    ("TORCH_CUDA_ARCH_LIST", "90"),
    ("TORCH_CUDA_ARCH_LIST", "9.0+ptx"),
    ("TORCH_CUDA_ARCH_LIST", "9.0;hopper"),
    ("TORCH_CUDA_ARCH_LIST", "native;9.0"),
    ("MAX_JOBS", ""),
    ("MAX_JOBS", "0"),
    ("MAX_JOBS", "two"),
    ("MAX_JOBS", "-1"),
    ("MAX_JOBS", "1.5"),
    ("CUDA_HOME", " "),
    ("CUDA_PATH", ""),
    ("CXX", ""),
    ("CXX", "g++ 'unfinished"),
    ("CXXFLAGS", '-DX="unfinished'),
    ("LDFLAGS", "'"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}" for name, value in WRONG])
def test_values_that_cannot_be_meant_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name.replace('SGL_COMM', 'SGLCOMM')}: got .*; expected "):
        settings.read_settings({name: value})


def test_an_empty_environment_asks_for_nothing() -> None:
    assert settings.read_settings({}) == settings.Settings(None, None, None, None, None, (), ())


def test_values_are_read_as_a_shell_and_torch_would() -> None:
    asked = settings.read_settings(
        {
            "SGLCOMM_BUILD_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": "9.0a 8.0,Hopper",
            "CUDA_PATH": "/opt/cuda",
            "CXX": "ccache g++",
            "MAX_JOBS": "3",
            "CPPFLAGS": "-I'/a b'",
            "CXXFLAGS": "",
            "LDFLAGS": "-s -Wl,-z,now",
        }
    )
    assert asked.build_cuda is True
    assert [str(arch) for arch in asked.archs or ()] == ["8.0", "9.0+PTX", "9.0a"]
    assert asked.cuda_home == ("CUDA_PATH", "/opt/cuda")
    assert asked.cxx == ("ccache", "g++")
    assert (asked.max_jobs, asked.cpp_flags, asked.link_flags) == (3, ("-I/a b",), ("-s", "-Wl,-z,now"))


def test_the_old_name_of_a_variable_works(capfd: pytest.CaptureFixture[str]) -> None:
    assert settings.read_settings({"SGL_COMM_BUILD_CUDA": "0"}).build_cuda is False
    assert "SGL_COMM_BUILD_CUDA is an old name" in capfd.readouterr().out


KNOWN = ["80", "90", "90a", "100"]
ARCHS = [
    ("", "", "8.0;9.0+PTX"),
    ("", "9.0", "9.0+PTX"),
    ("", "8.0;9.0", "8.0;9.0+PTX"),
    ("", "9.0;9.9", "8.0;9.0+PTX"),  # newer than nvcc: PTX of an older one runs there
    ("native", "8.0", "8.0+PTX"),
    ("9.0a", "8.0", "9.0a"),
    ("9.0;8.0", "", "8.0;9.0"),
]


@pytest.mark.parametrize(("asked", "gpus", "wanted"), ARCHS)
def test_architectures_are_those_asked_for_else_those_of_the_machine(asked: str, gpus: str, wanted: str) -> None:
    asks = settings.read_settings({"TORCH_CUDA_ARCH_LIST": asked} if asked else {})
    here = settings.parse_archs(gpus) if gpus else ()
    assert ";".join(map(str, toolchain.choose_archs(asks, KNOWN, here))) == wanted


@pytest.mark.parametrize("asked", ["native", "6.1", "9.0f"])
def test_architectures_that_nvcc_cannot_compile_for_are_refused(asked: str) -> None:
    asks = settings.read_settings({"TORCH_CUDA_ARCH_LIST": asked})
    with pytest.raises(RuntimeError, match=r"TORCH_CUDA_ARCH_LIST: got .*knows \(80 90 90a 100\)"):
        toolchain.choose_archs(asks, KNOWN, ())


# What there is to build with.


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_ninja_that_cannot_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path / "broken/ninja", "#!/nowhere/python\n")
    monkeypatch.setenv("PATH", str(tmp_path / "broken"))
    assert toolchain.find_ninja() is None
    works = make_program(tmp_path / "works/ninja", "#!/bin/sh\necho 1.11\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'broken'}:{tmp_path / 'works'}")
    assert toolchain.find_ninja() == str(works)


def test_the_ninja_that_built_before_builds_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("system", "environment"):
        make_program(tmp_path / name / "ninja", "#!/bin/sh\necho 1.11\n")
    last = tmp_path / "ninja.txt"
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    assert toolchain.find_ninja(last) == str(tmp_path / "system/ninja")
    monkeypatch.setenv("PATH", f"{tmp_path / 'environment'}:{tmp_path / 'system'}")
    assert toolchain.find_ninja(last) == str(tmp_path / "system/ninja")
    (tmp_path / "system/ninja").unlink()
    assert toolchain.find_ninja(last) == str(tmp_path / "environment/ninja")


def cuda_reason(environ: dict[str, str], tmp_path: Path) -> str | None:
    cxx = toolchain.Cxx(("c++",), sys.executable, "c++ 1", False)
    memory = toolchain.Memory(tmp_path / "known.json")
    return toolchain.plan_cuda(settings.read_settings(environ), "13.0", cxx, "c++17", memory).reason


def test_a_wrong_cuda_home_is_refused_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        with pytest.raises(RuntimeError, match=f"{name}: got '/no/such'; expected .*there is no such folder"):
            cuda_reason({name: "/no/such"}, tmp_path)
        reason = cuda_reason({name: str(tmp_path / "runtime")}, tmp_path)
        assert reason == f"{name} is {tmp_path / 'runtime'}, which has no bin/nvcc, and there is none on PATH"
    nvcc = make_program(tmp_path / "nvcc", "#!/bin/sh\n")
    with pytest.raises(RuntimeError, match=f"CUDA_HOME: got .*bin/nvcc .the one on PATH is {nvcc}"):
        cuda_reason({"CUDA_HOME": str(tmp_path / "runtime")}, tmp_path)


def test_cuda_that_was_asked_for_and_cannot_be_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    make_program(tmp_path / "nvcc", "#!/bin/sh\necho release 12.4,\n")
    assert cuda_reason({}, tmp_path) == "nvcc is 12.4 but torch was built with CUDA 13.0; the major versions must agree"
    with pytest.raises(RuntimeError, match=r"but the CUDA library cannot be built: nvcc is 12\.4"):
        cuda_reason({"SGLCOMM_BUILD_CUDA": "1"}, tmp_path)


@pytest.mark.parametrize("command", ["no-such-compiler", "ccache", "ccache no-such-compiler"])
def test_a_compiler_that_is_not_there_is_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path / "ccache", '#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=f"CXX: got '{command}'; expected a"):
        toolchain.find_cxx(settings.read_settings({"CXX": command}), "c++17", toolchain.Memory(tmp_path / "known.json"))


def test_a_compiler_that_cannot_compile_is_refused_with_what_it_says(tmp_path: Path) -> None:
    compiler = make_program(tmp_path / "old", "#!/bin/sh\necho error: unknown standard >&2\nexit 1\n")
    asks = settings.read_settings({"CXX": str(compiler)})
    with pytest.raises(RuntimeError, match=r"CXX: got .*a compiler of c\+\+20 \(this one says: error: unknown"):
        toolchain.find_cxx(asks, "c++20", toolchain.Memory(tmp_path / "known.json"))


def test_old_setuptools_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    backend._check_setuptools()
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(RuntimeError, match=r'setuptools is 65.5.0; expected 70.1 or newer.*pip install "setuptools'):
        backend._check_setuptools()


# Which torch.


def make_torch(folder: Path, version: str, cuda: str | None = "13.0") -> Path:
    """A folder that holds as much of a torch as the build reads."""
    header = folder / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\ngit_version = 'abc'\n"
    )
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of an environment that has no torch."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=DEADLINE_S)
    return folder / "bin/python"


def torch_found_by(python: Path, **installer: str) -> str:
    """The version of the torch that a build finds, or None or why not, in a build that pip has isolated: the installer
    was started with these variables, and the build itself is given others."""
    find = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from build_tools import torch_finder as f"
    find += "; torch = f.find_torch(); print(torch and torch.version)"
    isolated = shlex.join(["env", "PYTHONPATH=/isolated", "PYTHONNOUSERSITE=1", str(python), "-c", find])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = ["sh", "-c", f"{isolated}; exit $?"]  # more than one command, so that the shell stays its parent
    done = subprocess.run(command, env=kept | installer, capture_output=True, text=True, timeout=DEADLINE_S)
    return (done.stdout.strip() or done.stderr).splitlines()[-1]


def test_the_torch_of_this_python_is_found_however_it_comes(bare_python: Path, tmp_path: Path) -> None:
    torch = make_torch(tmp_path / "elsewhere", "2.11.0a0+eb65b36914.nv26.2")
    assert torch_found_by(bare_python) == "None"
    assert torch_found_by(bare_python, PYTHONPATH=str(torch)) == "2.11.0a0+eb65b36914.nv26.2"
    site = next((bare_python.parents[1] / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(f"{torch}\n")
    assert torch_found_by(bare_python) == "2.11.0a0+eb65b36914.nv26.2"
    (site / "torch.pth").unlink()


def test_no_torch_is_taken_from_an_environment_around_this_one(bare_python: Path, tmp_path: Path) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    make_torch(tmp_path / "conda/lib" / version / "site-packages", "2.12.0")
    around = str(tmp_path / "conda")
    assert torch_found_by(bare_python, CONDA_PREFIX=around, VIRTUAL_ENV=around) == "None"


def test_user_packages_count_unless_they_are_switched_off(tmp_path: Path) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    make_torch(tmp_path / "lib" / version / "site-packages", "2.99.0")
    base = Path(sys.base_prefix, "bin", version)
    if not base.exists():
        pytest.skip(f"{base}: no Python outside an environment here")
    assert torch_found_by(base, PYTHONUSERBASE=str(tmp_path)) == "2.99.0"
    assert torch_found_by(base, PYTHONUSERBASE=str(tmp_path), PYTHONNOUSERSITE="1") != "2.99.0"


def test_a_torch_that_is_too_old_is_left_as_it_is_and_said(bare_python: Path, tmp_path: Path) -> None:
    torch = make_torch(tmp_path, "2.10.1")
    said = torch_found_by(bare_python, PYTHONPATH=str(torch))
    assert said.startswith(f"RuntimeError: sgl_comm needs torch >= 2.11, but {tmp_path} has torch 2.10.1.")


def test_pip_takes_pre_releases_of_the_oldest_torch_for_enough() -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    wanted = specifiers.SpecifierSet(torch_finder.TORCH_REQUIREMENT.removeprefix("torch"))
    for version in ("2.11.0a0+eb65b36914.nv26.2", "2.11.0.dev20260101", "2.11.0rc1", "2.11.0+cu130", "2.15.0"):
        assert wanted.contains(version, prereleases=True), version  # how pip asks of what is installed
    assert not wanted.contains("2.10.1", prereleases=True)
    assert list(wanted.filter(["2.15.0", "2.16.0rc1"])) == ["2.15.0"]  # how pip chooses what to install
    assert f'"{torch_finder.TORCH_REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("install -e .[test]", False),
        ("install --no-deps -v .", False),
        ("install --index-url https://internal .", True),
        ("install --extra-index-url=https://internal .", True),
        ("install -ihttps://internal .", True),
        ("install -c constraints.txt .", True),
        ("install --pre .", True),
        ("install --no-index .", True),
    ],
)
def test_headers_are_not_fetched_where_the_command_says_where_from(arguments: str, named: bool) -> None:
    assert torch_headers.names_sources(arguments.split()) == named


# A little project, compiled for real, in a folder whose name has what a path may hold.

FILES = {
    "csrc/precompiled.h": "#include <vector>\n",
    "csrc/shared.h": "inline int shared() { return 1; }\n",
    "csrc/ops.cpp": '#include "shared.h"\nextern "C" int answer() { return shared() + std::vector<int>(1).at(0); }\n',
    "csrc/cpu/other.cpp": "int other() { return 2; }\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The little project; the build knows no other. Every call of a compiler leaves a line in `calls`."""
    root = tmp_path / "a b$c'd;e(ü),f&g#h"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(native, "ROOT", root)
    monkeypatch.setattr(native, "FETCHED_HEADERS", root / "fetched")
    for name in ("CXXFLAGS", "CPPFLAGS", "LDFLAGS", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SGLCOMM_BUILD_CUDA", "0")
    calls = tmp_path / "calls"
    wrapper = make_program(tmp_path / "wrapper", f'#!/bin/sh\necho "$@" >>"{calls}"\nexec c++ "$@"\n')
    monkeypatch.setenv("CXX", str(wrapper))
    return root


def compiled(project: Path) -> list[str]:
    """The files compiled since the last call, and `link`; none if no compiler was started."""
    calls = project.parent / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    files = [word for line in lines for word in line.split() if word.startswith("csrc/")]
    return sorted(files) + ["link" for line in lines if ".abi3.so" in line]


def test_a_second_build_starts_no_compiler_and_an_edit_compiles_what_depends_on_it(project: Path) -> None:
    first = native.compile_libraries("1.0")
    assert compiled(project) == ["csrc/cpu/other.cpp", "csrc/ops.cpp", "csrc/precompiled.h", "link"]
    assert [path.name for path in first.libraries] == ["_C.abi3.so"]
    assert native.compile_libraries("1.0") == first
    assert compiled(project) == []
    (project / "csrc/shared.h").write_text("inline int shared() { return 5; }\n")
    native.compile_libraries("1.0")
    assert compiled(project) == ["csrc/ops.cpp", "link"]
    assert str(project) not in (project / "build/native/build.ninja").read_text()


def test_a_torch_that_lies_elsewhere_compiles_nothing_and_another_one_all(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(folder: str, version: str) -> None:
        torch = torch_finder.read_torch(make_torch(project.parent / folder, version) / "torch")
        monkeypatch.setattr(native, "torch_to_build_with", lambda: torch)

    use("here", "2.11.0")
    native.compile_libraries("1.0")
    compiled(project)
    use("there", "2.11.0")
    native.compile_libraries("1.0")
    assert compiled(project) == []
    use("newer", "2.12.0")
    native.compile_libraries("1.0")
    assert len(compiled(project)) == 4


def test_a_failed_build_leaves_what_is_installed_as_it_was(project: Path) -> None:
    folder = project / "package"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    native.install(native.compile_libraries("1.0"), folder, "_build_info.json")
    before = files()
    assert set(before) == {"_C.abi3.so", "_build_info.json"}
    (project / "csrc/ops.cpp").write_text("this is no C++\n")
    with pytest.raises(RuntimeError, match="a compiler failed, see above; what was installed is as it was"):
        native.install(native.compile_libraries("1.0"), folder, "_build_info.json")
    assert files() == before
    (project / "csrc/ops.cpp").write_text(FILES["csrc/ops.cpp"])
    (folder / "_C_cuda.abi3.so").touch()  # of an earlier build
    native.install(native.compile_libraries("1.0"), folder, "_build_info.json")
    assert files() == before
    assert json.loads(before["_build_info.json"])["cuda_reason"] == "SGLCOMM_BUILD_CUDA=0 was set"


def test_compilers_of_several_words_and_flags_of_the_user(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = make_program(project.parent / "ccache", '#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("CXX", f"{launcher} {os.environ['CXX']} -DOF_COMPILER='\"a b\"'")
    monkeypatch.setenv("CPPFLAGS", "-DANSWER='41 + 1'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-rpath,/of/this/machine")
    (project / "csrc/ops.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) const char* words() { return OF_COMPILER; }\n'
        "int answer() { return ANSWER; }\n"
    )
    library = native.compile_libraries("1.0").libraries[0]
    ask = f"import ctypes; c = ctypes.CDLL({str(library)!r}); c.words.restype = ctypes.c_char_p; print(c.words())"
    done = subprocess.run([sys.executable, "-c", f"import torch; {ask}"], capture_output=True, timeout=DEADLINE_S)
    assert done.stdout.decode().strip() == "b'a b'", done.stderr.decode()
    assert b"/of/this/machine" not in library.read_bytes()


def test_wrong_values_are_refused_before_anything_is_compiled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(RuntimeError, match="MAX_JOBS: got 'many'"):
        native.compile_libraries("1.0")
    assert compiled(project) == []


@pytest.fixture
def command(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[str]]:
    """Runs `build_ext` as setuptools would, in place or for a wheel; gives the files it says it has made."""
    from build_tools.commands import BuildExt

    def run(inplace: bool) -> list[str]:
        monkeypatch.chdir(project)
        distribution = Distribution({"name": "sgl_comm", "version": "1.0", "packages": ["sgl_comm"]})
        (project / "sgl_comm").mkdir(exist_ok=True)
        build = BuildExt(distribution)
        build.inplace, build.build_lib = inplace, "built"
        build.ensure_finalized()
        build.run()
        return [build.get_output_mapping().get(path, path) for path in build.get_outputs()]

    return run


def test_wheels_and_editable_installs_share_what_is_compiled(
    project: Path, command: Callable[[bool], list[str]]
) -> None:
    assert command(True) == ["sgl_comm/_C.abi3.so", "sgl_comm/_build_info.json"]
    compiled(project)
    made = command(False)
    assert made == ["built/sgl_comm/_C.abi3.so", "built/sgl_comm/_build_info.json"]
    assert compiled(project) == []
    assert all((project / path).is_file() for path in made)


def test_no_path_of_this_machine_is_in_the_ninja_file() -> None:
    library = ninja_file.Library("_C", ("csrc/ops.cpp", "csrc/cuda/one_shot.cu"), ("torch_cpu",))
    build = ninja_file.Build(
        *("build/native", "build/native/host", "build/native/cuda-8.0;9.0", "build/native/out"),
        *(("c++",), (), (), "c++17", (), True, (library,), ("nvcc",), "/usr/bin/c++"),
        archs=settings.parse_archs("8.0;9.0+PTX"),
    )
    text = ninja_file.ninja_file(build)
    assert "'-gencode=arch=compute_90,code=[sm_90,compute_90]'" in text
    assert "code=[sm_80]" in text
    assert text.index("csrc/cuda/one_shot.cu.o:") < text.index("csrc/ops.cpp.o:")  # what takes longest is begun first


def test_the_files_with_loops_are_there_and_are_optimised() -> None:
    library = ninja_file.Library("_C", (*ninja_file.WITH_LOOPS, "csrc/ops.cpp"), ("torch_cpu",))
    text = ninja_file.ninja_file(
        ninja_file.Build(
            *("build/native", "build/native/host", "build/native/kernels", "build/native/out"),
            *(("c++",), (), (), "c++17", (), False, (library,)),
        )
    )
    assert [path for path in ninja_file.WITH_LOOPS if not (ROOT / path).is_file()] == []
    assert text.count("more = -O3") == len(ninja_file.WITH_LOOPS)
