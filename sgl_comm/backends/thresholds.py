"""From which size on which algorithm is best: one table, by GPU architecture and world size.

The table is filled when it is first asked, so every public function here asks ``_maybe_init_config()`` first; nobody
sees it empty. The world sizes that the kernels serve are its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_comm.errors import SglCommError

_KIB = 1 << 10
_MIB = 1 << 20

ALL_SIZES = 1 << 62
"""Bytes: more than any message has."""

_FALLBACK_BYTES = 128 * _MIB
_REFERENCE_MAJOR = 9

# World -> bytes up to which one shot is best. SM90: to four ranks as measured on H100s and H200s, docs/thresholds.md;
# beyond, and for Blackwell (SM100), as published.
_ONE_SHOT_BYTES = {
    9: {2: ALL_SIZES, 3: 384 * _KIB, 4: 192 * _KIB, 5: 192 * _KIB, 6: 128 * _KIB, 7: 128 * _KIB, 8: 128 * _KIB},
    10: {2: 4 * _MIB, 3: 4 * _MIB, 4: 2 * _MIB, 5: 2 * _MIB, 6: 1 * _MIB, 7: 896 * _KIB, 8: 720 * _KIB},
}

# The same for the sizes from which a ring is better, where that has been measured.
_RING_BYTES = {9: {3: 2560 * _KIB, 4: 2560 * _KIB}}


@dataclass(frozen=True)
class Thresholds:
    """Sizes of a message, in bytes, at which the choice changes.

    Attributes:
        one_shot_bytes: up to here one shot; two shots above.
        ring_bytes: above it a ring, though the workspace may hold the message at once.
        fallback_bytes: above it NCCL, where results may depend on the size (``SGLCOMM_INVARIANT=0``).
    """

    one_shot_bytes: int
    ring_bytes: int
    fallback_bytes: int


_config: dict[int, dict[int, Thresholds]] = {}
"""Major number of the compute capability -> world size -> thresholds. Filled by ``_maybe_init_config``."""


def _maybe_init_config() -> None:
    """Fills the table unless it is filled."""
    if _config:
        return
    _config.update(
        {
            major: {
                world: Thresholds(size, _RING_BYTES.get(major, {}).get(world, ALL_SIZES), _FALLBACK_BYTES)
                for world, size in row.items()
            }
            for major, row in _ONE_SHOT_BYTES.items()
        }
    )


def supported_world_sizes() -> tuple[int, ...]:
    """The world sizes that the table knows, ascending: those that the kernels serve, besides 1."""
    _maybe_init_config()
    return tuple(sorted(_config[_REFERENCE_MAJOR]))


def thresholds_for(world: int, compute_capability: tuple[int, int]) -> Thresholds:
    """The thresholds of a group of this size on GPUs of this architecture; an unknown one takes SM90's.

    Raises:
        SglCommError: a world size that the table does not know.
    """
    _maybe_init_config()
    row = _config.get(compute_capability[0], _config[_REFERENCE_MAJOR])
    if world not in row:
        raise SglCommError(f"thresholds_for: got world size {world}; expected one of {supported_world_sizes()}")
    return row[world]
