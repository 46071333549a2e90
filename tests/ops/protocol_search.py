"""The search through every interleaving of the push protocol's model, see protocol_model.py.

The full search takes every step apart. The reduced one takes a poll as soon as it can be taken, and EMPTY stores as
late as they can be: when a later store of their thread, behind a fence, becomes visible, or when their launch ends.
That loses nothing: a poll changes no memory, and what it lets its thread store may still be delayed without limit; and
an EMPTY store enables nothing but a launch's end, so the later it is, the more slots are full. Tests compare the two.

A state is (launches, ranks, memory). launches[past + e] is the kind of launch e, counted from the slowest rank's, and
the buffer that each rank takes for it. Past kinds are told apart only by what they left full, and buffers are numbered
in the order in which launches took them. A rank is (launch, next op, batches, loose): stores that are not yet visible,
those of its main thread in batches between fences, and those in no order with them. A store is (cell, value, age): into
the buffer of launch - age. Memory is one byte a slot, buffer by buffer: 0 for EMPTY, else launch and tile; then one
byte a credit, whose cells are negative numbers. In the search, launches and ranks are numbers (_Numbered): a state is
small then, and what a rank may do as far as memory does not decide it is worked out once (_Moves, _Wait).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from protocol_model import Op, Protocol, Use


@dataclass(frozen=True)
class Verdict:
    """What a search found: how many states there are, what went wrong first ("" if nothing), and the way there."""

    states: int
    violation: str = ""
    trace: tuple[str, ...] = ()


def search(protocol: Protocol, reduced: bool = True) -> Verdict:
    """Goes through every state that any sequence of launches can reach, breadth first, up to the first violation."""
    return _Search(protocol, reduced).run()


_Store = tuple[int, int, int]
_Batches = tuple[tuple[_Store, ...], ...]
_Rank = tuple[int, int, _Batches, tuple[_Store, ...]]
_Launches = tuple[tuple[int, tuple[int, ...]], ...]
_State = tuple[int, tuple[int, ...], bytes]
_Apart = tuple[_Launches, tuple[_Rank, ...], bytes]
"""A state with its launches and ranks in full."""

_PAST = 4
_TILES = 8
_CREDITS = ("give", "await")
_STOP = -1
_NOTHING = -2  # a past launch, if any, that left nothing full
_AGING = bytes(b if b <= _TILES else b - _TILES for b in range(256))


def _value(launch: int, tile: int) -> int:
    return 1 + (launch + _PAST) * _TILES + tile


class _Violation(Exception):
    pass


_T = TypeVar("_T")


class _Numbered(Generic[_T]):
    """Things by number, the same number for the same thing."""

    def __init__(self) -> None:
        self._numbers: dict[_T, int] = {}
        self.things: list[_T] = []

    def number(self, thing: _T) -> int:
        number = self._numbers.setdefault(thing, len(self.things))
        if number == len(self.things):
            self.things.append(thing)
        return number


class _Move(NamedTuple):
    """A store of a rank that may reach memory now: at ``index``, behind EMPTY at ``forced``."""

    step: str
    forced: tuple[int, ...]
    index: int
    written: int
    onto_slot: bool
    """Whether it is a push, which no full slot may be under."""
    target: int
    """Whose memory it is; -1 for an EMPTY store, which nobody waits for."""
    after: int
    """The rank's number afterwards."""


class _Moves(NamedTuple):
    """What a rank may do next, as far as that can be told without memory."""

    name: str
    stores: tuple[_Move, ...]
    running: bool
    """Whether it has an op left, for which it waits."""
    may_end: bool


class _Wait(NamedTuple):
    """What a rank waits for: bytes of memory, by index."""

    what: str
    cells: tuple[tuple[int, int], ...]
    """Where, and which value."""
    never: bool
    """Whether a slot is among them that its own thread is about to empty."""
    too_late: int
    """The first value that is a later launch's."""


class _Search:
    def __init__(self, protocol: Protocol, reduced: bool) -> None:
        self.protocol, self.reduced = protocol, reduced
        self.past = protocol.defer if protocol.boundary else _PAST  # how many earlier launches matter
        programs = [[kind.program(r, protocol.world) for r in range(protocol.world)] for kind in protocol.kinds]
        every_op = [op for ranks in programs for ops in ranks for op in ops]
        width = 1 + max(slot for op in every_op if op.what not in _CREDITS for _, slot, _ in op.cells)
        self.stride = width * protocol.world
        self.size = self.stride * protocol.buffers.count

        def compiled(op: Op) -> tuple[str, tuple[_Store, ...]]:
            if op.what in _CREDITS:
                return op.what, tuple((-1 - r * protocol.world - p, k + 1, 0) for r, p, k in op.cells)
            return op.what, tuple((r * width + p, 0 if op.what == "reset" else k + 1, 0) for r, p, k in op.cells)

        self.programs = [
            [[compiled(op) for op in ops if op.cells or op.what == "fence"] for ops in ranks] for ranks in programs
        ]
        self.full = [[_left_full(ops) for ops in ranks] for ranks in self.programs]
        self.in_the_past = [self.full.index(full) if any(full) else _NOTHING for full in self.full]
        self.width = width
        self.launches: _Numbered[_Launches] = _Numbered()
        self.ranks: _Numbered[_Rank] = _Numbered()
        self.moves: dict[tuple[int, int, int], _Moves] = {}
        self.waits: dict[tuple[int, int, int], _Wait | None] = {}
        self.passed: dict[tuple[int, int, int], int] = {}

    def run(self) -> Verdict:
        came_from: dict[_State, tuple[_State | None, str]] = {}
        waiting: deque[_State] = deque()
        state: _State | None = None
        try:
            for state in self._starts():
                came_from.setdefault(state, (None, ""))
            waiting.extend(came_from)
            while waiting:
                state = waiting.popleft()
                count = 0
                for step, after in self._steps(state):
                    count += 1
                    way = state, step
                    if came_from.setdefault(after, way) is way:
                        waiting.append(after)
                if count == 0:
                    self._check_end(state)
        except _Violation as violation:
            trace = []
            while state is not None:
                state, step = came_from[state]
                trace.append(step)
            return Verdict(len(came_from), str(violation), tuple(reversed(trace[:-1])))
        return Verdict(len(came_from))

    def _starts(self) -> Iterator[_State]:
        buffers, world = self.protocol.buffers, self.protocol.world
        memory = bytes(self.size + world * world)
        past = ((_NOTHING, (buffers.before,) * world),) * self.past
        for kind in range(len(self.protocol.kinds)):
            launches, _ = self._renamed((*past, (kind, (buffers.first,) * world)), memory)
            ranks = (self._started(launches, r, 0, (), memory) for r in range(world))
            yield self._together((launches, tuple(ranks), memory))

    def _together(self, state: _Apart) -> _State:
        launches, ranks, memory = state
        return self.launches.number(launches), tuple(self.ranks.number(rank) for rank in ranks), memory

    def _apart(self, state: _State) -> _Apart:
        launches, ranks, memory = state
        return self.launches.things[launches], tuple(self.ranks.things[rank] for rank in ranks), memory

    def _steps(self, state: _State) -> Iterator[tuple[str, _State]]:
        launches, ranks, memory = state
        for r, rank in enumerate(ranks):
            key = launches, r, rank
            moves = self.moves.get(key)
            if moves is None:
                moves = self.moves[key] = self._moves(*key)
            for step, forced, index, written, onto_slot, target, after in moves.stores:
                # The store, behind those that a fence forces before it, reaches memory.
                cells = bytearray(memory)
                for each in forced:
                    cells[each] = 0
                if onto_slot and cells[index]:
                    raise _Violation(f"{moves.name}a push lands on a full slot of rank {target}")
                cells[index] = written
                new_memory, new = bytes(cells), [*ranks]
                new[r] = after
                if target >= 0:
                    new[target] = self._gone_on(launches, target, new[target], new_memory)
                yield step, (launches, tuple(new), new_memory)
            if moves.running:
                if not self.reduced and self._may_go_on(launches, r, rank, memory):
                    new = [*ranks]
                    new[r] = self._gone_on(launches, r, self._passed(launches, r, rank), memory)
                    yield f"{moves.name}reads", (launches, tuple(new), memory)
            elif moves.may_end:
                for step, after in self._ended(self._apart(state), r, moves.name):
                    yield step, self._together(after)

    def _moves(self, launches_number: int, r: int, rank_number: int) -> _Moves:
        launches = self.launches.things[launches_number]
        launch, at, batches, loose = self.ranks.things[rank_number]
        kind, _ = launches[self.past + launch]
        name = f"rank {r}, {'stopped' if kind == _STOP else self.protocol.kinds[kind].name}: "
        stores = []

        def store(which: _Store, forced: tuple[_Store, ...], after: _Rank) -> None:
            cell, value, age = which
            target = cell // self.width if cell >= 0 else (-1 - cell) // self.protocol.world
            what = f"push of tile {value - 1}" if cell >= 0 else f"credit {value - 1}"
            move = _Move(
                f"{name}{what} reaches rank {target}" if value else f"{name}empties a slot",
                tuple(self._index(launches, r, launch - earlier, each) for each, _, earlier in forced),
                self._index(launches, r, launch - age, cell),
                _value(launch - age, value - 1) if value else 0,
                bool(value) and cell >= 0,
                target if value else -1,
                self.ranks.number(after),
            )
            stores.append(move)

        for each in loose:
            if each[1] or not self.reduced:
                store(each, (), (launch, at, batches, tuple(s for s in loose if s is not each)))
        for number, batch in enumerate(batches):
            for each in batch:
                if each[1] or not self.reduced:
                    left = tuple(s for s in batch if s is not each)
                    after = (launch, at, ((left,) if left else ()) + batches[number + 1 :], loose)
                    store(each, tuple(s for earlier in batches[:number] for s in earlier), after)
            if not self.reduced or any(value for _, value, _ in batch):
                break
        running = kind != _STOP and at < len(self.programs[kind][r])
        return _Moves(name, tuple(stores), running, kind != _STOP and not running and self._may_end(batches, loose))

    def _gone_on(self, launches: int, r: int, rank: int, memory: bytes) -> int:
        """Rank r after all that it does of itself: up to a wait that is not over (full search: any wait)."""
        while self._may_go_on(launches, r, rank, memory) and self.reduced:
            rank = self._passed(launches, r, rank)
        return rank

    def _passed(self, launches: int, r: int, rank: int) -> int:
        """Rank r behind what it waits for, and at its next wait."""
        key = launches, r, rank
        if key not in self.passed:
            launch, at, batches, loose = self.ranks.things[rank]
            passed = self._at_a_wait(self.launches.things[launches], r, (launch, at + 1, batches, loose))
            self.passed[key] = self.ranks.number(passed)
        return self.passed[key]

    def _ended(self, state: _Apart, r: int, name: str) -> Iterator[tuple[str, _Apart]]:
        """Rank r's launch ends; the next one starts, of each kind if no rank has started it before."""
        launches, ranks, memory = state
        launch, _, batches, loose = ranks[r]
        left: tuple[_Store, ...] = ()
        if self.protocol.boundary:
            cells = bytearray(memory)
            for cell, _, age in (*loose, *(s for batch in batches for s in batch)):
                cells[self._index(launches, r, launch - age, cell)] = 0
            memory = bytes(cells)
        else:
            left = tuple((c, v, age + 1) for c, v, age in (*loose, *(s for batch in batches for s in batch)))
        if len(launches) > self.past + launch + 1:
            choice = [launches]
        else:
            buffers = tuple(self._following(launches, rank) for rank in range(self.protocol.world))
            choice = [(*launches, (kind, buffers)) for kind in [_STOP, *range(len(self.protocol.kinds))]]
        for chosen in choice:
            started = self._started(chosen, r, launch + 1, left, memory)
            yield f"{name}ends", self._rebased((chosen, (*ranks[:r], started, *ranks[r + 1 :]), memory))

    def _started(self, launches: _Launches, r: int, launch: int, left: tuple[_Store, ...], memory: bytes) -> _Rank:
        defer, empties = self.protocol.defer, self.protocol.empties
        (kind, _), (emptied, _) = launches[self.past + launch], launches[self.past + launch - defer]
        if kind == _STOP or not self._leaves_full(emptied, r):
            counted: tuple[int, ...] = ()
        elif empties == "buffer":
            counted = tuple(range(r * self.width, (r + 1) * self.width))
        else:
            counted = self.full[emptied if empties == "earlier" else kind][r]
        loose = left + tuple((cell, 0, defer) for cell in counted)
        first = self._at_a_wait(launches, r, (launch, 0, (), loose))
        return self.ranks.things[self._gone_on(self.launches.number(launches), r, self.ranks.number(first), memory)]

    def _at_a_wait(self, launches: _Launches, r: int, rank: _Rank) -> _Rank:
        """Rank r after all that it does before it has to wait."""
        launch, at, batches, loose = rank
        kind, _ = launches[self.past + launch]
        program = [] if kind == _STOP else self.programs[kind][r]
        while at < len(program):
            what, stores = program[at]
            if what in ("poll", "await"):
                break
            if what == "send":
                loose += stores
            elif what == "fence":
                batches = (*batches, ()) if batches and batches[-1] else batches
            else:
                batches = (*batches[:-1], batches[-1] + stores) if batches else (stores,)
            at += 1
        return launch, at, batches, loose

    def _may_go_on(self, launches: int, r: int, rank: int, memory: bytes) -> bool:
        """Whether rank r waits for something, and has got it."""
        key = launches, r, rank
        if key not in self.waits:
            launch, at, batches, _ = self.ranks.things[rank]
            kind, _ = self.launches.things[launches][self.past + launch]
            program = [] if kind == _STOP else self.programs[kind][r]
            wait = None
            if at < len(program):
                wait = self._wait(self.launches.things[launches], r, launch, batches, program[at])
            self.waits[key] = wait
        wait = self.waits[key]
        return wait is not None and self._is_over(wait, r, memory)

    def _wait(
        self, launches: _Launches, r: int, launch: int, batches: _Batches, op: tuple[str, tuple[_Store, ...]]
    ) -> _Wait:
        what, stores = op
        emptied = {cell for batch in batches for cell, value, _ in batch if not value} if what == "poll" else set()
        cells = tuple(
            (self._index(launches, r, launch, cell), _value(launch, number - 1))
            for cell, number, _ in stores
            if cell not in emptied
        )
        return _Wait(what, cells, len(cells) < len(stores), _value(launch + 1, 0))

    def _is_over(self, wait: _Wait, r: int, memory: bytes) -> bool:
        """Whether all that rank r waits for is there."""
        what, cells, never, too_late = wait
        every = not never
        if what == "poll":
            for index, expected in cells:
                got = memory[index]
                if not got:
                    every = False
                elif got != expected:
                    raise _Violation(f"rank {r} reads a datum of another launch or tile")
            return every
        for index, expected in cells:
            if memory[index] >= too_late:
                raise _Violation(f"rank {r} finds a credit of a later launch, which the kernels do not take")
            every = every and memory[index] >= expected
        return every

    def _may_end(self, batches: _Batches, loose: tuple[_Store, ...]) -> bool:
        if not self.protocol.boundary:
            return True
        if self.reduced:
            return not any(s[1] for s in loose) and not any(s[1] for batch in batches for s in batch)
        return not loose and not any(batches)

    def _check_end(self, state: _State) -> None:
        """A state without a next step: the ranks have stopped, and their memory is as the last launch leaves it."""
        launches, ranks, memory = self._apart(state)
        stuck = [r for r, rank in enumerate(ranks) if launches[self.past + rank[0]][0] != _STOP]
        if stuck:
            raise _Violation(f"deadlock: ranks {stuck} wait")
        expected = bytearray(self.size) + memory[self.size :]
        for back in range(1, self.protocol.defer + 1):
            last, _ = launches[self.past - back]
            for r in range(self.protocol.world):
                for cell in self.full[last][r] if self._leaves_full(last, r) else ():
                    expected[self._index(launches, r, -back, cell)] = 1
        if any(bool(got) != bool(want) for got, want in zip(memory, expected, strict=True)):
            raise _Violation("other slots are full at the end than those of the last launch")

    def _following(self, launches: _Launches, r: int) -> int:
        """The buffer that rank r takes for the launch after these."""
        before, last = (Use(buffers[r], self._leaves_full(kind, r)) for kind, buffers in launches[-2:])
        return self.protocol.buffers.following(before, last)

    def _leaves_full(self, kind: int, r: int) -> bool:
        return kind != _NOTHING and len(self.full[kind][r]) > 0

    def _index(self, launches: _Launches, r: int, launch: int, cell: int) -> int:
        """Where a cell lies in the buffer that rank r takes for a launch; credits lie behind the buffers."""
        if cell < 0:
            return self.size - 1 - cell
        return launches[self.past + launch][1][r] * self.stride + cell

    def _rebased(self, state: _Apart) -> _Apart:
        """The state with launches counted from the slowest rank's."""
        launches, ranks, memory = state
        if min(rank[0] for rank in ranks) == 0:
            return state
        kind, buffers = launches[self.past]
        launches = (*launches[1 : self.past], (self.in_the_past[kind], buffers), *launches[self.past + 1 :])
        launches, memory = self._renamed(launches, memory.translate(_AGING))
        return launches, tuple((launch - 1, *rest) for launch, *rest in ranks), memory

    def _renamed(self, launches: _Launches, memory: bytes) -> tuple[_Launches, bytes]:
        """Numbers buffers in the order in which launches took them, then the others in a circle from the first on."""
        count = self.protocol.buffers.count
        taken = [buffer for _, buffers in launches for buffer in buffers]
        order = list(dict.fromkeys(taken + [(taken[0] + i) % count for i in range(count)]))
        parts = (memory[buffer * self.stride : (buffer + 1) * self.stride] for buffer in order)
        names = {buffer: name for name, buffer in enumerate(order)}
        renamed = tuple((kind, tuple(names[buffer] for buffer in buffers)) for kind, buffers in launches)
        return renamed, b"".join(parts) + memory[self.size :]


def _left_full(program: list[tuple[str, tuple[_Store, ...]]]) -> tuple[int, ...]:
    read = [cell for what, stores in program if what == "poll" for cell, _, _ in stores]
    reset = {cell for what, stores in program if what == "reset" for cell, _, _ in stores}
    return tuple(sorted(set(read) - reset))
