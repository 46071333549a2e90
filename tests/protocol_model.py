"""A model of the push protocol: its rules of memory, and each kind of launch as a program.

What is modelled. Every rank owns some banks of places; a place is EMPTY or holds a datum (launch, tile). For each of
its launches a rank takes one bank, by what its last two did (Banks). A launch is a program of pushes (stores into a
peer's places), polls (wait until places of one's own are not EMPTY, and read them), resets (EMPTY into places just
read, by the thread that polled them) and fences. What a launch reads and does not reset it leaves full: other threads
of launch e store EMPTY into every place that launch e - `defer` left full. All ranks make the same calls, in any order
of kinds, some of which leave their bank full and some not: the search (protocol_search.py) chooses a kind, or to stop,
whenever the first rank gets to a new launch. Launches are counted from the slowest rank's and banks are renamed, so
that finitely many states stand for sequences of any length. One pack a rank is enough: packs of one launch share no
place, and more of them only make a launch end later. Kinds use the same places from the first on, as far as they can
overlap.

Memory rules.
- A store becomes visible at any later moment, in any order with the other stores of its rank, whoever they go to.
- A fence puts its thread's stores before it before those after it. It does not hold up later polls.
- A launch ends when all of its rank's stores are visible; the rank's next launch starts after that.
- A poll reads memory in its place in the program, at any later moment; behind a reset by its own thread it does not see
  the datum that was reset. Nothing is lost by not letting stores pass earlier polls: in every program here, a push
  follows a poll only across a fence or because it sends what was read.

What must hold: no push becomes visible at a place that is not EMPTY (so no EMPTY store can hit a newer datum either),
no poll sees a datum of another launch or tile, some rank can always go on, and when the ranks stop only the places
that the last launch leaves full hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Cell = tuple[int, int, int]
"""The rank whose memory it is, the place in the bank, the tile it holds."""


@dataclass(frozen=True)
class Op:
    """One step of a launch: "push", "poll", "reset" or "fence", and the cells it is about."""

    what: str
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of launch: its name, and the program of each rank, called with (rank, world)."""

    name: str
    program: Callable[[int, int], list[Op]]


class Use(NamedTuple):
    """What a rank's launch does with the banks: which it takes, and whether it leaves that full for a later launch."""

    bank: int
    full: bool


def free_bank(before: Use, last: Use) -> int:
    """Of three banks, that of the launch before the last if it left nothing full there; else that of neither."""
    return 3 - before.bank - last.bank if before.full else before.bank


@dataclass(frozen=True)
class Banks:
    """Which bank each launch takes; as it stands, what the kernels do.

    Attributes:
        count: banks of each workspace.
        first: the bank of the first launch.
        before: the bank of the launch before the first, of which there was none: it left nothing full.
        following: which bank a rank takes, by what it did in the launch before the last and in the last. The search
            renames banks, so this may compare them, but not know them by number; rotation() alone counts on.
    """

    count: int = 3
    first: int = 0
    before: int = 1
    following: Callable[[Use, Use], int] = free_bank


def rotation(count: int) -> Banks:
    """Launch e takes bank e % count."""
    return Banks(count, first=0, before=count - 1, following=lambda before, last: (last.bank + 1) % count)


@dataclass(frozen=True)
class Protocol:
    """What is searched.

    Attributes:
        world: number of ranks.
        kinds: the kinds of launches that sequences are made of.
        banks: how many banks there are, and which launch takes which.
        defer: how many launches later that is emptied which a launch left full.
        empties: how many places: "earlier", of the launch to be emptied after; "own", of the emptying launch; "bank",
            all of a bank in which anything was left full.
        boundary: whether a launch waits for the end of the one before.
    """

    world: int
    kinds: tuple[Kind, ...]
    banks: Banks = Banks()
    defer: int = 1
    empties: str = "earlier"
    boundary: bool = True


def one_shot() -> Kind:
    """Everybody pushes to everybody; an all-gather is the same. Places: the sender."""

    def program(rank: int, world: int) -> list[Op]:
        peers = _peers(rank, world)
        return [Op("push", tuple((p, rank, 0) for p in peers)), Op("poll", tuple((rank, p, 0) for p in peers))]

    return Kind("one_shot", program)


def two_shot(owners: int | None = None, gather: bool = True) -> Kind:
    """Shards to their owners, sums back to all. Places: the sender, then world + the owner.

    Args:
        owners: how many ranks own a shard; None for all. A message may be too short for more.
        gather: whether sums go back; without, it is a reduce-scatter.
    """

    def program(rank: int, world: int) -> list[Op]:
        peers, owning = _peers(rank, world), range(world if owners is None else owners)
        ops = [Op("push", tuple((p, rank, 0) for p in peers if p in owning))]
        if rank in owning:
            ops.append(Op("poll", tuple((rank, p, 0) for p in peers)))
            ops.append(Op("push", tuple((p, world + rank, 0) for p in peers if gather)))
        return [*ops, Op("poll", tuple((rank, world + p, 0) for p in peers if p in owning and gather))]

    return Kind(("two_shot" if gather else "reduce_scatter") + (f"_{owners}" if owners is not None else ""), program)


def at_once(kind: Kind) -> Kind:
    """A kind that would leave its bank full, with a reset behind each poll."""

    def program(rank: int, world: int) -> list[Op]:
        ops = kind.program(rank, world)
        return [each for op in ops for each in ([op, Op("reset", op.cells)] if op.what == "poll" else [op])]

    return Kind(f"{kind.name}_at_once", program)


def ring(tiles: int, places: int = 4, fence: bool = True, reset_after_fence: bool = False) -> Kind:
    """The one-shot in tiles, one pushed ahead of the one polled. Places: sender * places + tile % places."""

    def program(rank: int, world: int) -> list[Op]:
        peers = _peers(rank, world)
        ops = []
        for k in range(tiles + 1):
            if k < tiles:
                ops.append(Op("push", tuple((p, rank * places + k % places, k) for p in peers)))
            if k > 0:
                cells = tuple((rank, p * places + (k - 1) % places, k - 1) for p in peers)
                reset, fences = Op("reset", cells), [Op("fence")] * fence
                ops += [Op("poll", cells), *([*fences, reset] if reset_after_fence else [reset, *fences])]
        return ops

    return Kind(f"ring({tiles})", program)


def two_shot_ring(
    tiles: int,
    places: int = 4,
    back_places: int = 4,
    last_owners: int | None = None,
    fence: bool = True,
    reset_after_fence: bool = False,
) -> Kind:
    """The two-shot in tiles: pushes shards of tile k, sums its own of k - 1, takes the sums of k - 2.

    Places: sender * places + tile % places, then world * places + owner * back_places + tile % back_places.

    Args:
        last_owners: how many ranks own a shard of the last tile; None for all.
    """

    def program(rank: int, world: int) -> list[Op]:
        peers = _peers(rank, world)

        def owning(k: int) -> range:
            return range(world if last_owners is None or k < tiles - 1 else last_owners)

        def back(owner: int, k: int) -> int:
            return world * places + owner * back_places + k % back_places

        ops = []
        for k in range(tiles + 2):
            read: list[Op] = []
            if k < tiles:
                ops.append(Op("push", tuple((p, rank * places + k % places, k) for p in peers if p in owning(k))))
            if 0 < k <= tiles and rank in owning(k - 1):
                cells = tuple((rank, p * places + (k - 1) % places, k - 1) for p in peers)
                read.append(Op("reset", cells))
                ops += [Op("poll", cells), *([] if reset_after_fence else read[-1:])]
                ops.append(Op("push", tuple((p, back(rank, k - 1), k - 1) for p in peers)))
            if k > 1:
                cells = tuple((rank, back(p, k - 2), k - 2) for p in peers if p in owning(k - 2))
                read.append(Op("reset", cells))
                ops += [Op("poll", cells), *([] if reset_after_fence else read[-1:])]
            ops += [Op("fence")] * fence + (read if reset_after_fence else [])
        return ops

    return Kind(f"two_shot_ring({tiles})", program)


def broadcast(source: int = 0) -> Kind:
    """One rank pushes and waits for nobody: what must not be in a sequence without an acknowledgement."""

    def program(rank: int, world: int) -> list[Op]:
        if rank == source:
            return [Op("push", tuple((p, rank, 0) for p in _peers(rank, world)))]
        return [Op("poll", ((rank, source, 0),))]

    return Kind("broadcast", program)


def _peers(rank: int, world: int) -> list[int]:
    return [p for p in range(world) if p != rank]
