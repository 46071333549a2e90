"""A model of the push protocol: its rules of memory, and each kind of launch as a program.

What is modelled. Every rank owns some buffers of slots; a slot is EMPTY or holds a datum (launch, tile). For each of
its launches a rank takes one buffer, by what its last two did (Buffers). A launch is a program of pushes (stores into a
peer's slots), polls (wait until slots of one's own are not EMPTY, and read them), resets (EMPTY into slots just
read, by the thread that polled them) and fences. In a ring other threads of the block push than the one that gives
credit ("send"), in no order with what that does. A credit is a word that one peer alone writes, in no buffer and never
emptied: "give" stores the launch and a number there, "await" waits for at least that number, of the same launch. What a
launch reads and does not reset it leaves full: other threads of launch e store EMPTY into every slot that launch e -
`defer` left full. All ranks make the same calls, in any order of kinds, some of which leave their buffer full and some
not: the search (protocol_search.py) chooses a kind, or to stop, whenever the first rank gets to a new launch. Launches
are counted from the slowest rank's and buffers are renamed, so that finitely many states stand for sequences of any
length. One pack a rank is enough: packs of one launch share no slot, and more of them only make a launch end later.
Kinds use the same slots from the first on, as far as they can overlap.

Memory rules.
- A store becomes visible at any later moment, in any order with the other stores of its rank, whoever they go to.
- A fence puts its thread's stores before it before those after it. It does not hold up later polls.
- A launch ends when all of its rank's stores are visible; the rank's next launch starts after that.
- A poll reads memory at its position in the program, at any later moment; behind a reset by its own thread it does not
  see the datum that was reset. Nothing is lost by not letting stores pass earlier polls: in every program here, a push
  follows a poll only because it sends what was read, or in a ring, where an await is an acquire.

What must hold: no push becomes visible at a slot that is not EMPTY (so no EMPTY store can hit a newer datum either),
no poll sees a datum of another launch or tile, some rank can always go on, and when the ranks stop only the slots
that the last launch leaves full hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Cell = tuple[int, int, int]
"""The rank whose memory it is, the slot in the buffer, the tile it holds."""


@dataclass(frozen=True)
class Op:
    """One step of a launch: "push", "send", "poll", "reset", "fence", "give" or "await", and the cells it is about.

    A credit's cell: whose word it is, which rank gives it, and its number.
    """

    what: str
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of launch: its name, and the program of each rank, called with (rank, world)."""

    name: str
    program: Callable[[int, int], list[Op]]


class Use(NamedTuple):
    """Which buffer a rank's launch takes, and whether it leaves that full for a later launch."""

    buffer: int
    full: bool


def free_buffer(before: Use, last: Use) -> int:
    """Of three buffers, that of the launch before the last if it left nothing full there; else that of neither."""
    return 3 - before.buffer - last.buffer if before.full else before.buffer


@dataclass(frozen=True)
class Buffers:
    """Which buffer each launch takes; as it stands, what the kernels do.

    Attributes:
        count: buffers of each workspace.
        first: the buffer of the first launch.
        before: the buffer of the launch before the first, of which there was none: it left nothing full.
        following: which buffer a rank takes, by what it did in the launch before the last and in the last. The search
            renames buffers, so this may compare them, but not know them by number; rotation() alone counts on.
    """

    count: int = 3
    first: int = 0
    before: int = 1
    following: Callable[[Use, Use], int] = free_buffer


def rotation(count: int) -> Buffers:
    """Launch e takes buffer e % count."""
    return Buffers(count, first=0, before=count - 1, following=lambda before, last: (last.buffer + 1) % count)


@dataclass(frozen=True)
class Protocol:
    """What is searched.

    Attributes:
        world: number of ranks.
        kinds: the kinds of launches that sequences are made of.
        buffers: how many buffers there are, and which launch takes which.
        defer: how many launches later that is emptied which a launch left full.
        empties: how many slots: "earlier", of the launch to be emptied after; "own", of the emptying launch; "buffer",
            all of a buffer in which anything was left full.
        boundary: whether a launch waits for the end of the one before.
    """

    world: int
    kinds: tuple[Kind, ...]
    buffers: Buffers = Buffers()
    defer: int = 1
    empties: str = "earlier"
    boundary: bool = True


def one_shot() -> Kind:
    """Everybody pushes to everybody; an all-gather is the same. Slots: the sender."""

    def program(rank: int, world: int) -> list[Op]:
        peers = _peers(rank, world)
        return [Op("push", tuple((p, rank, 0) for p in peers)), Op("poll", tuple((rank, p, 0) for p in peers))]

    return Kind("one_shot", program)


def two_shot(owners: int | None = None, gather: bool = True) -> Kind:
    """Shards to their owners, sums back to all. Slots: the sender, then world + the owner.

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
    """A kind that would leave its buffer full, with a reset behind each poll."""

    def program(rank: int, world: int) -> list[Op]:
        ops = kind.program(rank, world)
        return [each for op in ops for each in ([op, Op("reset", op.cells)] if op.what == "poll" else [op])]

    return Kind(f"{kind.name}_at_once", program)


@dataclass(frozen=True)
class Credits:
    """How a ring's ranks tell each other of emptied slots.

    Attributes:
        every: for how many tiles at once.
        awaited: whether a rank waits for them.
        behind_resets: whether they are given when the slots are empty, behind a fence.
        apart: whether pushes are in no order with that fence. Else a fence ends each tile, which leaves fewer states.
    """

    every: int = 2
    awaited: bool = True
    behind_resets: bool = True
    apart: bool = True

    @property
    def push(self) -> str:
        return "send" if self.apart else "push"


CREDITS = Credits()
"""As it stands, what the kernels do."""


def ring(tiles: int, slots: int = 4, credits: Credits = CREDITS) -> Kind:
    """The one-shot in tiles, one pushed ahead of the one polled; an all-gather is the same.

    Slots: sender * slots + tile % slots.
    """

    def program(rank: int, world: int) -> list[Op]:
        peers = _peers(rank, world)
        ops = []
        for k in range(tiles + 1):
            if k < tiles:
                ops += _awaiting(credits, k, slots, rank, peers)
                ops.append(Op(credits.push, tuple((p, rank * slots + k % slots, k) for p in peers)))
            if k > 0:
                cells = tuple((rank, p * slots + (k - 1) % slots, k - 1) for p in peers)
                ops += _emptying(credits, k - 1, tiles, slots, rank, peers, [Op("poll", cells), Op("reset", cells)])
        return ops

    return Kind(f"ring({tiles})", program)


def two_shot_ring(
    tiles: int,
    slots: int = 4,
    credits: Credits = CREDITS,
    last_owners: int | None = None,
    gather: bool = True,
) -> Kind:
    """The two-shot in tiles: pushes shards of tile k, sums its own of k - 1, takes the sums of k - 2.

    Slots: sender * slots + tile % slots, then (world + owner) * slots + tile % slots.

    Args:
        last_owners: how many ranks own a shard of the last tile; None for all.
        gather: whether sums go back; without, it is a reduce-scatter.
    """

    def program(rank: int, world: int) -> list[Op]:
        peers, lag = _peers(rank, world), 2 if gather else 1

        def owning(k: int) -> range:
            return range(world if last_owners is None or k < tiles - 1 else last_owners)

        ops = []
        for k in range(tiles + lag):
            if k < tiles:
                ops += _awaiting(credits, k, slots, rank, peers)
                ops.append(Op(credits.push, tuple((p, rank * slots + k % slots, k) for p in peers if p in owning(k))))
            step: list[Op] = []
            if 0 < k <= tiles and rank in owning(k - 1):
                cells = tuple((rank, p * slots + (k - 1) % slots, k - 1) for p in peers)
                back = (world + rank) * slots + (k - 1) % slots
                step += [Op("poll", cells), Op("reset", cells)]
                step.append(Op(credits.push, tuple((p, back, k - 1) for p in peers if gather)))
            if gather and k > 1:
                owners = [p for p in peers if p in owning(k - 2)]
                cells = tuple((rank, (world + p) * slots + (k - 2) % slots, k - 2) for p in owners)
                step += [Op("poll", cells), Op("reset", cells)]
            ops += _emptying(credits, k - lag, tiles, slots, rank, peers, step)
        return ops

    return Kind(f"two_shot_ring({tiles})", program)


def _awaiting(credits: Credits, k: int, slots: int, rank: int, peers: list[int]) -> list[Op]:
    """Before tile k is pushed."""
    if not credits.awaited or k < slots or k % credits.every:
        return []
    number = (k - slots) // credits.every + 1
    return [Op("await", tuple((rank, p, number) for p in peers))]


def _emptying(credits: Credits, k: int, tiles: int, slots: int, rank: int, peers: list[int], ops: list[Op]) -> list[Op]:
    """``ops``, after which tile k's slots are empty, and the credit, if anyone will wait for it."""
    if not credits.apart:
        ops = [*ops, Op("fence")]
    if k < 0 or (k + 1) % credits.every or k + 1 - credits.every + slots >= tiles:
        return ops
    give = Op("give", tuple((p, rank, (k + 1) // credits.every) for p in peers))
    if credits.behind_resets:
        return [*ops, Op("fence"), give]
    return [*(op for op in ops if op.what != "reset"), give, *(op for op in ops if op.what == "reset")]


def broadcast(source: int = 0) -> Kind:
    """One rank pushes and waits for nobody: what must have no part in the buffers (test_broadcast_protocol.py)."""

    def program(rank: int, world: int) -> list[Op]:
        if rank == source:
            return [Op("push", tuple((p, rank, 0) for p in _peers(rank, world)))]
        return [Op("poll", ((rank, source, 0),))]

    return Kind("broadcast", program)


def _peers(rank: int, world: int) -> list[int]:
    return [p for p in range(world) if p != rank]
