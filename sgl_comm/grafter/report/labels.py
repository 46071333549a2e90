"""Short texts for what a report names: tags, ranks, paths; printable, whatever the files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def printable(text: str) -> str:
    """The text with what would move a cursor, or cannot be encoded, as an escape sequence."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def shortened(text: str, length: int) -> str:
    """A text of at most ``length`` letters: a longer one loses its middle."""
    half = length // 2 - 1
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def tags_label(tags: Mapping[str, Any]) -> str:
    """Tags as text without spaces of its own: "layer=3,step=0"."""
    return ",".join(f"{name}={value}" for name, value in tags.items())


def ranks_label(ranks: Iterable[int]) -> str:
    """Ranks as text: "0-3,5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
