"""The search through every interleaving of the push protocol's model, see protocol_model.py.

The full search takes every step apart. The reduced one takes a poll as soon as it can be taken, and EMPTY stores as
late as they can be: when a later store of their thread, behind a fence, becomes visible, or when their launch ends.
That loses nothing: a poll changes no memory, and what it lets its thread store may still be delayed without limit; and
an EMPTY store enables nothing but a launch's end, so the later it is, the more places are full. Tests compare the two.

A state is (launches, ranks, memory). launches[past + e] is the kind of launch e, counted from the slowest rank's, and
the bank that each rank takes for it. Past kinds are told apart only by what they left full, and banks are numbered in
the order in which launches took them. A rank is (launch, next op, batches, loose): stores that are not yet visible,
those of its main thread in batches between fences, and those in no order with them. A store is (cell, value, age): into
the bank of launch - age. Memory is one byte a place, bank by bank: 0 for EMPTY, else launch and tile; then one byte a
credit, whose cells are negative numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

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
_State = tuple[_Launches, tuple[_Rank, ...], bytes]

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


class _Search:
    def __init__(self, protocol: Protocol, reduced: bool) -> None:
        self.protocol, self.reduced = protocol, reduced
        self.past = protocol.defer if protocol.boundary else _PAST  # how many earlier launches matter
        programs = [[kind.program(r, protocol.world) for r in range(protocol.world)] for kind in protocol.kinds]
        every_op = [op for ranks in programs for ops in ranks for op in ops]
        width = 1 + max(place for op in every_op if op.what not in _CREDITS for _, place, _ in op.cells)
        self.stride = width * protocol.world
        self.size = self.stride * protocol.banks.count

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

    def run(self) -> Verdict:
        came_from: dict[_State, tuple[_State | None, str]] = {}
        waiting: deque[_State] = deque()

        def found(state: _State, before: _State | None, step: str) -> None:
            if state not in came_from:
                came_from[state] = before, step
                waiting.append(state)

        state: _State | None = None
        try:
            for state in self._starts():
                found(state, None, "")
            while waiting:
                state = waiting.popleft()
                count = 0
                for step, after in self._steps(state):
                    found(after, state, step)
                    count += 1
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
        banks, world = self.protocol.banks, self.protocol.world
        memory = bytes(self.size + world * world)
        past = ((_NOTHING, (banks.before,) * world),) * self.past
        for kind in range(len(self.protocol.kinds)):
            launches, _ = self._renamed((*past, (kind, (banks.first,) * world)), memory)
            ranks = (self._started(launches, r, 0, (), memory) for r in range(world))
            yield launches, tuple(ranks), memory

    def _steps(self, state: _State) -> Iterator[tuple[str, _State]]:
        launches, ranks, memory = state
        for r, (launch, at, batches, loose) in enumerate(ranks):
            kind, _ = launches[self.past + launch]
            name = f"rank {r}, {'stopped' if kind == _STOP else self.protocol.kinds[kind].name}: "
            for store in loose:
                if store[1] or not self.reduced:
                    left = tuple(s for s in loose if s is not store)
                    yield self._visible(state, r, store, (), (launch, at, batches, left), name)
            for number, batch in enumerate(batches):
                for store in batch:
                    if store[1] or not self.reduced:
                        left = tuple(s for s in batch if s is not store)
                        after = (launch, at, ((left,) if left else ()) + batches[number + 1 :], loose)
                        forced = tuple(s for earlier in batches[:number] for s in earlier)
                        yield self._visible(state, r, store, forced, after, name)
                if not self.reduced or any(value for _, value, _ in batch):
                    break
            if kind == _STOP:
                continue
            program = self.programs[kind][r]
            if at < len(program):
                if not self.reduced and self._may_go_on(launches, r, launch, batches, program[at], memory):
                    rank = self._advanced(launches, r, (launch, at + 1, batches, loose), memory)
                    yield f"{name}reads", self._with(state, r, rank, memory)
            elif self._may_end(batches, loose):
                yield from self._ended(state, r, name)

    def _visible(
        self, state: _State, r: int, store: _Store, forced: tuple[_Store, ...], after: _Rank, name: str
    ) -> tuple[str, _State]:
        """One store, behind those that a fence forces before it, reaches memory."""
        launches, _, memory = state
        cells = bytearray(memory)
        for cell, _, age in forced:
            cells[self._index(launches, r, after[0] - age, cell)] = 0
        cell, value, age = store
        index = self._index(launches, r, after[0] - age, cell)
        target = cell // self.width if cell >= 0 else (-1 - cell) // self.protocol.world
        if value and cell >= 0 and cells[index]:
            raise _Violation(f"{name}a push lands on a full place of rank {target}")
        cells[index] = _value(after[0] - age, value - 1) if value else 0
        memory = bytes(cells)
        new = self._with(state, r, after, memory)
        if value:
            new = self._with(new, target, self._advanced(launches, target, new[1][target], memory), memory)
        what = f"push of tile {value - 1}" if cell >= 0 else f"credit {value - 1}"
        step = f"{name}{what} reaches rank {target}" if value else f"{name}empties a place"
        return step, new

    def _ended(self, state: _State, r: int, name: str) -> Iterator[tuple[str, _State]]:
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
            banks = tuple(self._following(launches, rank) for rank in range(self.protocol.world))
            choice = [(*launches, (kind, banks)) for kind in [_STOP, *range(len(self.protocol.kinds))]]
        for chosen in choice:
            started = self._started(chosen, r, launch + 1, left, memory)
            yield f"{name}ends", self._rebased((chosen, (*ranks[:r], started, *ranks[r + 1 :]), memory))

    def _started(self, launches: _Launches, r: int, launch: int, left: tuple[_Store, ...], memory: bytes) -> _Rank:
        defer, empties = self.protocol.defer, self.protocol.empties
        (kind, _), (emptied, _) = launches[self.past + launch], launches[self.past + launch - defer]
        if kind == _STOP or not self._leaves_full(emptied, r):
            counted: tuple[int, ...] = ()
        elif empties == "bank":
            counted = tuple(range(r * self.width, (r + 1) * self.width))
        else:
            counted = self.full[emptied if empties == "earlier" else kind][r]
        loose = left + tuple((cell, 0, defer) for cell in counted)
        return self._advanced(launches, r, (launch, 0, (), loose), memory)

    def _advanced(self, launches: _Launches, r: int, rank: _Rank, memory: bytes) -> _Rank:
        """Rank r after all that it does of itself: up to a poll that it cannot take yet (full search: any poll)."""
        launch, at, batches, loose = rank
        kind, _ = launches[self.past + launch]
        program = [] if kind == _STOP else self.programs[kind][r]
        while at < len(program):
            what, stores = program[at]
            if what in ("poll", "await"):
                if not self._may_go_on(launches, r, launch, batches, program[at], memory) or not self.reduced:
                    break
            elif what == "send":
                loose += stores
            elif what == "fence":
                batches = (*batches, ()) if batches and batches[-1] else batches
            else:
                batches = (*batches[:-1], batches[-1] + stores) if batches else (stores,)
            at += 1
        return launch, at, batches, loose

    def _may_go_on(
        self,
        launches: _Launches,
        r: int,
        launch: int,
        batches: _Batches,
        op: tuple[str, tuple[_Store, ...]],
        memory: bytes,
    ) -> bool:
        if op[0] == "poll":
            return self._may_read(launches, r, launch, batches, op[1], memory)
        found = [(memory[self._index(launches, r, launch, word)], n) for word, n, _ in op[1]]
        if any(value >= _value(launch + 1, 0) for value, _ in found):
            raise _Violation(f"rank {r} finds a credit of a later launch, which the kernels do not take")
        return all(value >= _value(launch, n - 1) for value, n in found)

    def _may_read(
        self, launches: _Launches, r: int, launch: int, batches: _Batches, cells: tuple[_Store, ...], memory: bytes
    ) -> bool:
        every = True
        for cell, expected, _ in cells:
            got = memory[self._index(launches, r, launch, cell)]
            if not got or any(cell == s[0] and not s[1] for batch in batches for s in batch):
                every = False
            elif got != _value(launch, expected - 1):
                raise _Violation(f"rank {cell // self.width} reads a datum of another launch or tile")
        return every

    def _may_end(self, batches: _Batches, loose: tuple[_Store, ...]) -> bool:
        if not self.protocol.boundary:
            return True
        if self.reduced:
            return not any(s[1] for s in loose) and not any(s[1] for batch in batches for s in batch)
        return not loose and not any(batches)

    def _check_end(self, state: _State) -> None:
        """A state without a next step: the ranks have stopped, and their memory is as the last launch leaves it."""
        launches, ranks, memory = state
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
            raise _Violation("other places are full at the end than those of the last launch")

    def _following(self, launches: _Launches, r: int) -> int:
        """The bank that rank r takes for the launch after these."""
        before, last = (Use(banks[r], self._leaves_full(kind, r)) for kind, banks in launches[-2:])
        return self.protocol.banks.following(before, last)

    def _leaves_full(self, kind: int, r: int) -> bool:
        return kind != _NOTHING and len(self.full[kind][r]) > 0

    def _index(self, launches: _Launches, r: int, launch: int, cell: int) -> int:
        """Where a cell lies in the bank that rank r takes for a launch; credits lie behind the banks."""
        if cell < 0:
            return self.size - 1 - cell
        return launches[self.past + launch][1][r] * self.stride + cell

    def _with(self, state: _State, r: int, rank: _Rank, memory: bytes) -> _State:
        launches, ranks, _ = state
        return launches, (*ranks[:r], rank, *ranks[r + 1 :]), memory

    def _rebased(self, state: _State) -> _State:
        """The state with launches counted from the slowest rank's."""
        launches, ranks, memory = state
        if min(rank[0] for rank in ranks) == 0:
            return state
        kind, banks = launches[self.past]
        launches = (*launches[1 : self.past], (self.in_the_past[kind], banks), *launches[self.past + 1 :])
        launches, memory = self._renamed(launches, memory.translate(_AGING))
        return launches, tuple((launch - 1, *rest) for launch, *rest in ranks), memory

    def _renamed(self, launches: _Launches, memory: bytes) -> tuple[_Launches, bytes]:
        """Numbers banks in the order in which launches took them, then the others in a circle from the first on."""
        count = self.protocol.banks.count
        taken = [bank for _, banks in launches for bank in banks]
        order = list(dict.fromkeys(taken + [(taken[0] + i) % count for i in range(count)]))
        parts = (memory[bank * self.stride : (bank + 1) * self.stride] for bank in order)
        names = {bank: name for name, bank in enumerate(order)}
        renamed = tuple((kind, tuple(names[bank] for bank in banks)) for kind, banks in launches)
        return renamed, b"".join(parts) + memory[self.size :]


def _left_full(program: list[tuple[str, tuple[_Store, ...]]]) -> tuple[int, ...]:
    read = [cell for what, stores in program if what == "poll" for cell, _, _ in stores]
    reset = {cell for what, stores in program if what == "reset" for cell, _, _ in stores}
    return tuple(sorted(set(read) - reset))
