"""The broadcast's protocol (csrc/cuda/device/broadcast.cuh) keeps its promises in every interleaving of a model of it.

One block and one pack a tile. Every rank has slots, EMPTY or full of a tile, and a word for each rank: how many tiles
that one is done with. A launch is a program of stores and waits; a store becomes visible at any later moment, in any
order with the others of its rank, but not before those behind which a fence stands; a launch ends when all of its
stores are visible. A wait looks at memory and goes on as soon as it can, which loses nothing, since it changes no
memory and stores behind it may still be delayed. The search chooses who the source is and how many tiles there are, or
to stop, whenever the first rank gets to a new launch. Tiles are counted from about the slowest rank's first.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import pytest

EMPTY, STOP = -1000, None

Store = tuple[int, int, int, int]
"""Whose memory, which slot (the words of counts follow the slots), the value, and how many fences came before it."""
Launch = tuple[int, int] | None
"""The source and the number of tiles."""


@dataclass(frozen=True)
class Protocol:
    """As it stands, what the kernels do, but for the numbers of slots and tiles.

    Attributes:
        launches: which there are to choose from.
        slots: of each rank.
        done: after how many tiles a receiver tells how far it is, where a source may wait for that.
        awaits: whether a source waits for its peers' slots.
        publishes_in_between: whether receivers tell before the next launch.
        behind_emptying: whether that is behind a fence.
        publishes_to_all: whether receivers tell every rank, or the source alone.
    """

    world: int
    launches: tuple[Launch, ...]
    slots: int = 4
    done: int = 2
    awaits: bool = True
    publishes_in_between: bool = True
    behind_emptying: bool = True
    publishes_to_all: bool = True

    def program(self, rank: int, launch: tuple[int, int], first: int) -> list[tuple[str, int, int]]:
        """(what, number, value) of each step; tiles are absolute."""
        source, tiles = launch
        if rank == source:
            steps = [("publish", -1, first)]
            for tile in range(first, first + tiles):
                steps += [("await", 0, tile + 1 - self.slots)] if self.awaits else []
                steps.append(("push", tile % self.slots, tile))
            return steps
        readers = -1 if self.publishes_to_all else source
        steps = [("publish", readers, first)]
        for k in range(tiles):
            steps += [("poll", (first + k) % self.slots, first + k), ("empty", (first + k) % self.slots, EMPTY)]
            awaited = k % self.done == self.done - 1 and k + 1 - self.done + self.slots < tiles
            if awaited and self.publishes_in_between:
                steps += [("fence", 0, 0)] if self.behind_emptying else []
                steps.append(("publish", readers, first + k + 1))
        return steps


class _Violation(Exception):
    pass


Rank = tuple[int, int, int, tuple[Store, ...], int]
"""Which launch, its first tile, the next step, stores on their way, and fences so far."""
State = tuple[tuple[Launch, ...], tuple[Rank, ...], tuple[tuple[int, ...], ...]]


def search(protocol: Protocol) -> tuple[int, str]:
    """How many states there are, and what went wrong first, or an empty text."""
    model = _Model.of(protocol)
    memory = ((EMPTY,) * protocol.slots + (0,) * protocol.world,) * protocol.world
    seen: set[State] = set()
    waiting: deque[State] = deque()
    everyone = range(protocol.world)
    try:
        for launch in protocol.launches:
            state: State = ((launch,), ((0, 0, 0, (), 0),) * protocol.world, memory)
            waiting.append(_went_on(model, state, everyone))
        while waiting:
            state = waiting.popleft()
            if state in seen:
                continue
            seen.add(state)
            after = list(_steps(model, state))
            if not after:
                _check_end(state, protocol)
            waiting.extend(each for each in after if each not in seen)
    except _Violation as violation:
        return len(seen), str(violation)
    return len(seen), ""


@dataclass(frozen=True)
class _Model:
    """A protocol, with what is asked for again and again remembered: programs, and how far a rank goes on."""

    protocol: Protocol
    program: Callable[[int, tuple[int, int], int], list[tuple[str, int, int]]]
    advanced: Callable[[Launch, int, Rank, tuple[int, ...]], Rank]

    @classmethod
    def of(cls, protocol: Protocol) -> _Model:
        program = functools.cache(protocol.program)
        return cls(protocol, program, functools.cache(functools.partial(_advanced, protocol, program)))


def _steps(model: _Model, state: State) -> Iterator[State]:
    protocol, program = model.protocol, model.program
    launches, ranks, memory = state
    for r, (launch, first, at, stores, fences) in enumerate(ranks):
        for number, (owner, slot, value, fence) in enumerate(stores):
            if any(other[3] < fence for other in stores):
                continue
            cells = list(memory[owner])
            if slot < protocol.slots and value != EMPTY and cells[slot] != EMPTY:
                raise _Violation(f"rank {r} pushes onto a full slot")
            cells[slot] = value
            after = (launch, first, at, stores[:number] + stores[number + 1 :], fences)
            changed = (*memory[:owner], tuple(cells), *memory[owner + 1 :])
            yield _went_on(model, (launches, (*ranks[:r], after, *ranks[r + 1 :]), changed), {r, owner})
        chosen = launches[launch]
        if chosen is not STOP and not stores and at == len(program(r, chosen, first)):
            for more in (
                [launches] if len(launches) > launch + 1 else [(*launches, x) for x in (STOP, *protocol.launches)]
            ):
                after = (launch + 1, first + chosen[1], 0, (), 0)
                moved = _rebased(protocol, (more, (*ranks[:r], after, *ranks[r + 1 :]), memory))
                yield _went_on(model, moved, range(protocol.world))


def _went_on(model: _Model, state: State, who: Collection[int]) -> State:
    """These ranks take the steps that they can; for the others nothing has changed."""
    launches, ranks, memory = state
    moved = list(ranks)
    for r in who:
        moved[r] = model.advanced(launches[ranks[r][0]], r, ranks[r], memory[r])
    return launches, tuple(moved), memory


def _advanced(
    protocol: Protocol,
    program_of: Callable[[int, tuple[int, int], int], list[tuple[str, int, int]]],
    chosen: Launch,
    r: int,
    rank: Rank,
    cells: tuple[int, ...],
) -> Rank:
    launch, first, at, stores, fences = rank
    program = [] if chosen is STOP else program_of(r, chosen, first)
    peers = [p for p in range(protocol.world) if p != r]
    while at < len(program):
        what, number, value = program[at]
        if what == "poll":
            emptied = any(owner == r and slot == number for owner, slot, _, _ in stores)
            if cells[number] == EMPTY or emptied:
                break
            if cells[number] != value:
                raise _Violation(f"rank {r} reads another tile")
        elif what == "await":
            if any(cells[protocol.slots + p] < value for p in peers):
                break
        elif what == "fence":
            fences += 1
        elif what == "empty":
            stores += ((r, number, EMPTY, fences),)
        elif what == "push":
            stores += tuple((p, number, value, fences) for p in peers)
        else:
            readers = peers if number < 0 else [number]
            stores += tuple((p, protocol.slots + r, value, fences) for p in readers)
        at += 1
    return launch, first, at, tuple(sorted(stores)), fences


def _rebased(protocol: Protocol, state: State) -> State:
    """Without the launches that every rank has left behind, and with tiles counted from about the slowest rank's."""
    launches, ranks, memory = state
    gone = min(rank[0] for rank in ranks)
    shift = min(rank[1] for rank in ranks) // protocol.slots * protocol.slots
    low = -protocol.slots  # a count that is lower is as good as none

    def shifted(slot: int, value: int) -> int:
        return max(value - shift, low) if slot >= protocol.slots else value if value == EMPTY else value - shift

    moved = tuple(
        (launch - gone, first - shift, at, tuple(sorted((o, p, shifted(p, v), f) for o, p, v, f in stores)), fences)
        for launch, first, at, stores, fences in ranks
    )
    return launches[gone:], moved, tuple(tuple(shifted(p, v) for p, v in enumerate(cells)) for cells in memory)


def _check_end(state: State, protocol: Protocol) -> None:
    launches, ranks, memory = state
    stuck = [r for r, rank in enumerate(ranks) if launches[rank[0]] is not STOP]
    if stuck:
        raise _Violation(f"deadlock: ranks {stuck} wait")
    if any(cell != EMPTY for cells in memory for cell in cells[: protocol.slots]):
        raise _Violation("a slot is full at the end")


@pytest.mark.parametrize(
    ("protocol", "at_least"),
    [
        (Protocol(2, ((0, 1), (0, 3), (1, 7))), 8_000),
        (Protocol(2, ((0, 1), (1, 1), (0, 2), (1, 2)), slots=2, done=1), 1_700),
        (Protocol(2, ((0, 3), (1, 10)), slots=8, done=4), 48_000),
        (Protocol(3, ((0, 1), (1, 3)), slots=2, done=1), 64_000),
        (Protocol(3, ((0, 1), (1, 1), (2, 1)), slots=2, done=1), 160_000),
    ],
    ids=["two", "two by turns", "two with all slots", "three", "three by turns"],
)
def test_any_sequence_of_broadcasts(protocol: Protocol, at_least: int) -> None:
    states, violation = search(protocol)
    assert violation == ""
    assert states >= at_least


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_as_many_slots_are_needed_as_tiles_between_two_words(slots: int, done: int) -> None:
    _, violation = search(Protocol(2, ((0, 7), (1, 1)), slots=slots, done=done))
    assert violation == ("" if slots >= done else "deadlock: ranks [0, 1] wait")


def test_a_source_that_does_not_wait_for_slots_is_caught() -> None:
    _, violation = search(Protocol(2, ((0, 7), (1, 1)), awaits=False))
    assert "reads another tile" in violation or "pushes onto a full slot" in violation


@pytest.mark.parametrize("world", [2, 3])
def test_a_word_that_goes_before_the_emptying_is_caught(world: int) -> None:
    _, violation = search(Protocol(world, ((0, 7), (1, 1)), behind_emptying=False))
    assert "pushes onto a full slot" in violation


def test_receivers_that_tell_nothing_in_between_are_a_deadlock() -> None:
    _, violation = search(Protocol(2, ((0, 7), (1, 1)), publishes_in_between=False))
    assert violation == "deadlock: ranks [0, 1] wait"


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_enough_to_tell_the_source(world: int) -> None:
    """The kernels tell every rank all the same: the next source then need not wait for that."""
    _, violation = search(Protocol(world, ((0, 3), (1, 1)), slots=2, done=1, publishes_to_all=False))
    assert violation == ""
