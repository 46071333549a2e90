"""How commands and benchmarks end: on errors, Ctrl-C and full disks, and where the reader of their output has gone."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgl_comm.errors import SglCommError

CANNOT = 2
"""Exit status, as argparse's: a file cannot be read or written, or an argument cannot be."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as a shell gives it."""

NOT_READ = 128 + signal.SIGPIPE
"""Exit status where the reader of the output has gone (``| head -1``), as a shell gives it. 1 means something else."""

STATUSES = (
    f"Besides what the command says, the exit status is {CANNOT} for a bad argument or a file that cannot be read or"
    f" written, {INTERRUPTED} after Ctrl-C, and {NOT_READ} where the output's reader has gone. A closed output is"
    " /dev/null."
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[], int | None]) -> int:
    """Runs a program's main function and returns the exit status, with a traceback for faults of the program alone."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal does not have goes as an escape sequence
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = main()
        except SystemExit:  # argparse's
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        status, words = INTERRUPTED, ""
    except SglCommError as error:
        status, words = CANNOT, f"sgl_comm: {error}"
    except BrokenPipeError:
        if not any(_reader_is_gone(stream) for stream in (sys.stdout, sys.stderr)):
            raise
        status, words = NOT_READ, ""
    except OSError as error:
        if error.errno not in _FULL:
            raise
        status, words = CANNOT, f"sgl_comm: cannot write the output: {error}"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do takes no time worth interrupting
    _end_children()
    if words:
        with contextlib.suppress(OSError):
            print(words, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _flush_or_drop(stream)
    return status


def why_not_written(file: Path) -> str:
    """Why a file cannot be written, as far as can be known before; empty if it can."""
    folder = file.absolute().parent
    if not folder.is_dir():
        return f"no such folder: {folder}"
    if file.is_dir():
        return f"{file} is a folder"
    if not os.access(file if file.exists() else folder, os.W_OK):
        return f"{file if file.exists() else folder} may not be written"
    return ""


def write(file: Path, text: str) -> None:
    """Writes a file of results.

    Raises:
        SglCommError: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SglCommError(f"cannot write {file}: {error.strerror}") from error


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends. A process that is started in it never sees one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_children() -> None:
    """Ends all processes below this one: a rank that was only being started is in no pool yet."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children[parent].append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children[process]
    for process in found[1:]:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGTERM)


def _open_closed_streams() -> None:
    """Puts /dev/null where a standard stream is closed, here and in child processes.

    Else the next file to be opened would take its number, and be written to by whatever prints.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)


def _reader_is_gone(stream: Any) -> bool:
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _flush_or_drop(stream: Any) -> None:
    """Writes what can be written and drops the rest, so that the interpreter does not try, and complain, at exit."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
