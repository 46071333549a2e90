"""How commands meet the terminal: what they import, who may run them, and how they end when nobody reads them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from helpers.programs import DEADLINE_S, PACKAGE_PARENT, environment, run_python
from sgl_comm import SglCommError
from sgl_comm.tools import command_line

BROADCAST = Path(__file__).parents[2] / "benchmarks" / "bench_broadcast.py"


@contextmanager
def started(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, as a shell would start it; nothing of it is left behind."""
    process = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for each in (process.pid, *living(process.pid)):
            with suppress(OSError):
                os.kill(each, signal.SIGKILL)
        process.communicate()


def living(session: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(folder.name))
    return found


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its status and what it has said on stderr, which ends with its last child; and nothing of it runs any more."""
    assert process.stderr is not None
    complaints = process.stderr.read()
    status = process.wait(DEADLINE_S)
    ends_at = time.monotonic() + 10
    while living(process.pid) and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert living(process.pid) == []
    return status, complaints


IMPORTS = """
import contextlib, io, sys, torch
before = set(sys.modules)
import sgl_comm
from sgl_comm.__main__ import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["bench", "--help"])
print([name for name in ("sgl_comm.grafter", "sgl_comm.tools.graft_report") if name in sys.modules])
import sgl_comm.tools.graft_report, sgl_comm.layers, sgl_comm.models
heavy = {"torch._dynamo", "torch._inductor", "sympy", "matplotlib", "getpass"}
print(sorted(heavy & (set(sys.modules) - before)))
"""


def test_commands_import_what_they_need() -> None:
    done = run_python("-c", IMPORTS)
    assert done.stdout.split("\n") == ["[]", "[]", ""], done.stderr


def test_a_user_without_a_name_home_or_terminal_runs_bench(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef getpwuid(uid):\n    raise KeyError(f'uid not found: {uid}')\npwd.getpwuid = getpwuid\n"
    )
    done = run_python(
        "-m", "sgl_comm", "bench", "--device", "cpu", "--sizes", "1K", "--iters", "3", cwd=Path("/proc"),
        PYTHONPATH=f"{tmp_path}:{PACKAGE_PARENT}", PYTHONIOENCODING="ascii", LC_ALL="C", COLUMNS="1", TERM=None,
        **dict.fromkeys(("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("# wrong elements: 0 OK\n")
    assert done.stderr == ""


ENDS = """
import json, os, sys, tempfile, traceback
from sgl_comm import SglCommError
from sgl_comm.tools import command_line, graft_report
from sgl_comm.__main__ import main

def broken():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)

def closed():
    os.close(1)
    sys.stdout = None

def full():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

def ascii():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout.reconfigure(encoding="ascii")

def interrupt():
    raise KeyboardInterrupt

def fault():
    os.write(os.pipe()[1], b"")
    raise BrokenPipeError("of another pipe")

report = ["graft-report", sys.argv[1]]
cases = {
    "report, reader gone": (broken, lambda: main(report)),
    "report, closed": (closed, lambda: main(report)),
    "report, full": (full, lambda: main(report)),
    "help, reader gone": (broken, lambda: main(["--help"])),
    "short, reader gone": (broken, lambda: print("short")),
    "short, full": (full, lambda: print("short")),
    "letters": (ascii, lambda: print("\\u20ac \\u4e2d")),
    "interrupted": (ascii, interrupt),
    "another pipe": (ascii, fault),
}
ends = {}
for name, (prepare, call) in cases.items():
    errors = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(errors.fileno(), 2)
        prepare()
        try:
            status = command_line.run(call)
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
            status = 1
        try:
            if sys.stdout is not None:
                sys.stdout.flush()  # as the interpreter does, which takes longer to end
        except OSError:
            traceback.print_exc()
            status = 120
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors.seek(0)
    ends[name] = status, errors.read().decode()
print(json.dumps(ends))
"""


def test_how_programs_end(tmp_path: Path) -> None:
    line = {"kind": "setting", "role": "baseline", "rank": 0}
    (tmp_path / "graft-baseline-0.jsonl").write_text(json.dumps(line) + "\n")
    done = run_python("-c", ENDS, str(tmp_path), PYTHONUNBUFFERED=None)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    status, complaint = ends.pop("another pipe")
    assert (status, complaint.splitlines()[-1]) == (1, "BrokenPipeError: of another pipe")
    full = "cannot write the output: [Errno 28] No space left on device"
    assert ends == {
        "report, reader gone": [141, ""],
        "help, reader gone": [141, ""],
        "short, reader gone": [141, ""],
        "report, closed": [0, ""],
        "report, full": [2, f"sgl_comm: {full}\n"],
        "short, full": [2, f"sgl_comm: {full}\n"],
        "letters": [0, ""],
        "interrupted": [130, ""],
    }


@pytest.mark.parametrize("program", [("-m", "sgl_comm", "bench"), (str(BROADCAST),)])
def test_a_cut_output_ends_a_benchmark_and_its_ranks(program: tuple[str, ...]) -> None:
    with started(*program, "--device", "cpu", "--iters", "3", "--sizes", "1K", "2K", "4K", "8K") as process:
        assert process.stdout is not None
        if program[0] == "-m":
            process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        assert end_of(process) == (141, "")


@pytest.mark.parametrize("ranks_live", [False, True])
def test_an_interrupt_ends_a_benchmark_and_its_ranks(ranks_live: bool) -> None:
    with started("-m", "sgl_comm", "bench", "--device", "cpu", "--iters", "1000") as process:
        assert process.stdout is not None
        if ranks_live:
            process.stdout.readline()
        else:  # as soon as there is a child, which imports for seconds
            ends_at = time.monotonic() + DEADLINE_S
            while len(living(process.pid)) < 3 and time.monotonic() < ends_at:
                time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert end_of(process) == (130, "")


def test_files_that_cannot_be_written_are_refused_before(tmp_path: Path) -> None:
    assert command_line.why_not_written(tmp_path / "new.json") == ""
    assert command_line.why_not_written(tmp_path) == f"{tmp_path} is a folder"
    assert command_line.why_not_written(tmp_path / "no" / "new.json") == f"no such folder: {tmp_path / 'no'}"
    if not os.access("/proc", os.W_OK):
        assert command_line.why_not_written(Path("/proc/new.json")) == "/proc may not be written"
    with pytest.raises(SglCommError, match=f"cannot write {tmp_path}: Is a directory"):
        command_line.write(tmp_path, "text")
