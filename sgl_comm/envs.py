"""Every environment variable of the package: its default and its meaning.

Names begin with ``SGLCOMM_``: SGLang takes every ``SGL_*`` for an old name of its own. The package's own old names,
``SGL_COMM_*``, are still read where the new one is unset; a warning says so once.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from sgl_comm.errors import SglCommError

logger = logging.getLogger(__name__)

PREFIX = "SGLCOMM_"
OLD_PREFIX = "SGL_COMM_"


@dataclass(frozen=True)
class EnvVar:
    """An environment variable: its name, its default as text, and what it means."""

    name: str
    default: str
    meaning: str

    @property
    def old_name(self) -> str:
        """What it was called in the package's first version."""
        return OLD_PREFIX + self.name.removeprefix(PREFIX)

    def given(self) -> str:
        """Its value now; empty where it is unset."""
        text = os.environ.get(self.name, "")
        if not text:
            text = os.environ.get(self.old_name, "")
            if text:
                _warn_of_old_name(self)
        return text

    def text(self) -> str:
        """Its value now, or the default where it is unset or empty."""
        return self.given() or self.default


_told_of_old_names: set[str] = set()


def _warn_of_old_name(variable: EnvVar) -> None:
    if variable.old_name not in _told_of_old_names:
        _told_of_old_names.add(variable.old_name)
        logger.warning("%s is an old name and still works; it is now %s", variable.old_name, variable.name)


TIMEOUT = EnvVar(
    "SGLCOMM_TIMEOUT",
    "300",
    "Seconds (float, above 0) after which a wait for a peer ends in an error. Read by init().",
)
CPU_INSTRUCTIONS = EnvVar(
    "SGLCOMM_CPU_INSTRUCTIONS",
    "",
    "avx512, avx2, neon or scalar: use no better instructions than these on the CPU. Read at the first sum; an"
    " unknown word means scalar.",
)
FIRST_EPOCH = EnvVar(
    "SGLCOMM_FIRST_EPOCH",
    "0",
    "For tests: the number that a communicator's steps and epochs are counted from (0 to 2**62), alike on all ranks."
    " Read by init().",
)
INVARIANT = EnvVar(
    "SGLCOMM_INVARIANT",
    "1",
    "1: where the package's kernels serve a group, they serve every size, so that a result never depends on its size."
    " 0: NCCL takes over above its threshold. Alike on all ranks. Read by init().",
)
CHECK = EnvVar(
    "SGLCOMM_CHECK",
    "0",
    "1: before a cfg_ call every rank's shape, dtype, device type and arguments are compared, by shared memory or gloo,"
    " so that a difference or a refusal is an error on every rank, and nothing is sent. Alike on all ranks. Read by"
    " init().",
)
BUILD_CUDA = EnvVar(
    "SGLCOMM_BUILD_CUDA",
    "",
    "At build time: 0 leaves the CUDA library out, 1 makes a missing nvcc an error. At import 1 warns where the build"
    " has left it out.",
)


def _grafter(name: str, meaning: str, default: str = "") -> EnvVar:
    return EnvVar(f"SGLCOMM_GRAFTER_{name.upper()}", default, f"{meaning} Read by GrafterConfig.from_env().")


_GRAFTER_FIELDS = {
    "enable": ("1: tensors are moved between this system and another one (see GrafterConfig).", "0"),
    "role": ("baseline or target: which of the two systems this is.",),
    "b2t_filter": ("An expression over tags: these tensors go from the baseline to the target.",),
    "t2b_filter": ("An expression over tags: these tensors go from the target to the baseline.",),
    "master_address": ("Where rank 0 of the baseline listens.",),
    "master_port": ("The port there.",),
    "baseline_world_size": ("How many ranks the baseline has.",),
    "target_world_size": ("How many ranks the target has.",),
    "rank": ("This process's rank inside its side, where neither the default group nor RANK says it.",),
    "backend": ("gloo, nccl or shm: what carries the tensors.", "gloo"),
    "group_name": ("A name that both sides give themselves.", "sgl_comm_grafter"),
    "timeout": ("Seconds (float) for the handshake of both sides, and for each exchange.", "300"),
    "mode": ("graft, observe (compare alone) or record (into record_dir, without another side).", "graft"),
    "layout": ("How this side's ranks hold a tensor: Replicate, Shard(dim) or Pad(dim, size[, layout]).",),
    "transform_path": ("package.module.function: makes the receiver's tensor of the senders' pieces.",),
    "on_dtype": ("error, cast or skip: what a receiver does with another dtype.", "error"),
    "on_shape": ("error, cast (a reshape of as many elements) or skip: what it does with another shape.", "error"),
    "strict": ("1: raise every fault, instead of logging and counting it.", "0"),
    "token": ("A secret that both sides must share.",),
    "report_dir": ("Where each rank's lines go, for `python -m sgl_comm graft-report`.", "graft_report"),
    "record_dir": ("Where mode=record writes tensors, and where mode=observe reads them instead of from a peer.",),
}
GRAFTER = {name: _grafter(name, *words) for name, words in _GRAFTER_FIELDS.items()}
"""Field of GrafterConfig -> its variable."""

ALL = (TIMEOUT, CPU_INSTRUCTIONS, FIRST_EPOCH, INVARIANT, CHECK, BUILD_CUDA, *GRAFTER.values())


def timeout_seconds() -> float:
    """``SGLCOMM_TIMEOUT`` in seconds.

    Raises:
        SglCommError: if it is not a number above 0.
    """
    text = TIMEOUT.text()
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise SglCommError(f"got {TIMEOUT.name}={text!r}; expected a number of seconds above 0")
    return seconds


def first_epoch() -> int:
    """``SGLCOMM_FIRST_EPOCH`` as a number.

    Raises:
        SglCommError: if it is not a whole number from 0 to 2**62.
    """
    text = FIRST_EPOCH.text()
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number <= 1 << 62:
        raise SglCommError(f"got {FIRST_EPOCH.name}={text!r}; expected a whole number from 0 to 2**62")
    return number


def invariant() -> bool:
    """``SGLCOMM_INVARIANT``.

    Raises:
        SglCommError: if it is neither 0 nor 1.
    """
    return _zero_or_one(INVARIANT)


def check() -> bool:
    """``SGLCOMM_CHECK``.

    Raises:
        SglCommError: if it is neither 0 nor 1.
    """
    return _zero_or_one(CHECK)


def _zero_or_one(variable: EnvVar) -> bool:
    text = variable.text()
    if text not in ("0", "1"):
        raise SglCommError(f"got {variable.name}={text!r}; expected 0 or 1")
    return text == "1"


def warn_about_names() -> None:
    """Logs a warning for each variable of an old name, and for each that nothing reads: mostly a misspelling."""
    for variable in ALL:
        variable.given()
    known = {name for variable in ALL for name in (variable.name, variable.old_name)}
    for name in sorted(os.environ):
        if name.startswith((PREFIX, OLD_PREFIX)) and name not in known:
            names = ", ".join(sorted(variable.name for variable in ALL))
            logger.warning("%s is set but sgl_comm has no such variable (known: %s)", name, names)
