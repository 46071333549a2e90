"""How many ranks each open group has: what the shape of a result may depend on while a compiler traces."""

from __future__ import annotations

_world_sizes: dict[str, list[int]] = {}
"""Group name -> the group's world size, once for each backend that has it open."""


def add(name: str, world: int) -> None:
    """Notes that a backend has opened the group."""
    _world_sizes.setdefault(name, []).append(world)


def remove(name: str) -> None:
    """Notes that a backend has closed the group."""
    sizes = _world_sizes.get(name, [])
    if sizes:
        sizes.pop()
    if not sizes:
        _world_sizes.pop(name, None)


def world_size(op: str, name: str) -> int:
    """The number of ranks of an open group.

    Raises:
        RuntimeError: no backend has opened the group; ``op`` begins the text.
    """
    if name not in _world_sizes:
        known = ", ".join(map(repr, _world_sizes)) or "none"
        raise RuntimeError(f"sgl_comm::{op}: unknown group {name!r}; call sgl_comm.init(group) first (known: {known})")
    return _world_sizes[name][-1]
