"""Long sequences on simulated ranks: all algorithms by turns, sizes that grow and shrink, graphs in between."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helpers.compare import assert_none_wrong, differences
from helpers.ranks import Pools, capturing, simulating_pools
from helpers.rows import OPS, SLACK, Rows, call, compared, input_count, result_count
from helpers.values import DTYPES
from sgl_comm.testing import RankContext, SimulatedRank, capture_simulated, make_simulated

pytestmark = pytest.mark.gpu

CALLS = {2: 500, 3: 2000, 8: 300}
"""World size -> how many calls a sequence has."""
MOST_ELEMENTS = {2: 1 << 20, 3: 1 << 20, 8: 1 << 17}
MAX_SIZE = {2: 256 << 10, 3: 256 << 10, 8: 64 << 10}
"""Of the workspaces: small, so that many messages go through rings."""
ONE_SHOT_BYTES = 96 << 10
"""So that auto takes both."""

EAGER_IN_A_BATCH, NUM_GRAPHS, CALLS_IN_A_GRAPH = 35, 3, 5
BATCH = EAGER_IN_A_BATCH + NUM_GRAPHS * CALLS_IN_A_GRAPH


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    kept = simulating_pools()
    yield kept
    kept.close()


@dataclass(frozen=True)
class Planned:
    """A call as all ranks make it: which window of each rank's row goes in."""

    op: str
    dtype: torch.dtype
    start: int
    count: int
    shifted: bool
    """The inputs of odd ranks are one element past an aligned address."""

    def __str__(self) -> str:
        return f"{self.op} of {self.count} {self.dtype}" + ", shifted" * self.shifted


class Plan:
    """Draws calls, with messages that grow from one element to the most and shrink again."""

    def __init__(self, world: int, most: int, seed: int) -> None:
        self._world, self._most, self._chance = world, most, random.Random(seed)
        self._drawn = 0

    def draw(self) -> Planned:
        period = 26
        height = 1 - abs(self._drawn % period * 2 / period - 1)
        self._drawn += 1
        exponent = height * (self._most.bit_length() - 1) + self._chance.uniform(-1, 1)
        size = min(self._most, max(1, int(2**exponent)))
        op = self._chance.choice(OPS)
        count = input_count(op, size, self._world)
        if self._chance.random() < 0.4:
            count = -(-count // (8 * self._world)) * 8 * self._world  # whole packs, also of each share
        start = self._chance.randrange(SLACK // 16) * 8 + self._chance.choice((0, 0, 2, 3))
        return Planned(op, self._chance.choice(DTYPES), start, count, self._chance.random() < 0.3)

    def moved(self, planned: Planned) -> Planned:
        """The same call of another window."""
        start = self._chance.randrange(SLACK // 16) * 8
        return Planned(planned.op, planned.dtype, start, planned.count, False)

    def shuffled(self, items: Sequence[object]) -> list[object]:
        return self._chance.sample(list(items), len(items))


class Graphs:
    """One graph a rank of the same calls, each with inputs of its own."""

    def __init__(self, ranks: Sequence[SimulatedRank], plan: Plan, device: torch.device) -> None:
        self._ranks, self._plan = ranks, plan
        self.planned = [plan.draw() for _ in range(CALLS_IN_A_GRAPH)]
        self.inputs = [[_placed(planned, rank, device) for planned in self.planned] for rank in range(len(ranks))]
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.outs: list[list[Tensor]] = []

    def capture(self) -> None:
        for rank, inputs in zip(self._ranks, self.inputs, strict=True):
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, stream=rank.stream):
                calls = zip(self.planned, inputs, strict=True)
                self.outs.append([call(planned.op, x, rank.group_name) for planned, x in calls])
            self.graphs.append(graph)

    def refill(self, rows: dict[torch.dtype, Rows]) -> None:
        self.planned = [self._plan.moved(planned) for planned in self.planned]
        for rank, inputs in enumerate(self.inputs):
            for planned, x in zip(self.planned, inputs, strict=True):
                x.copy_(rows[planned.dtype].window(rank, planned.start, planned.count))

    def replay(self) -> None:
        for rank, graph in zip(self._ranks, self.graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()


def _placed(planned: Planned, rank: int, device: torch.device) -> Tensor:
    """A place for an input, in odd ranks one element past an aligned address if the call is a shifted one."""
    shift = int(planned.shifted and rank % 2 == 1)
    return torch.empty(planned.count + shift, dtype=planned.dtype, device=device)[shift:]


def prime(ranks: Sequence[SimulatedRank], calls: Sequence[Planned], device: torch.device) -> None:
    """Lets torch hold enough memory for the results, since none should be asked for while kernels wait."""
    for rank in ranks:
        with torch.cuda.stream(rank.stream):
            held = [
                torch.empty(result_count(each.op, each.count, rank.world), dtype=each.dtype, device=device)
                for each in [*calls, *calls]
            ]
            held.clear()


def batch_of_calls(
    ranks: Sequence[SimulatedRank],
    plan: Plan,
    rows: dict[torch.dtype, Rows],
    graphs: Sequence[Graphs],
    device: torch.device,
    label: str,
) -> list[str]:
    """Eager calls and each graph once, in any order, without a pause; returns what is wrong."""
    eager = [plan.draw() for _ in range(EAGER_IN_A_BATCH)]
    prime(ranks, eager, device)
    for each in graphs:
        each.refill(rows)
    torch.cuda.synchronize()

    made: list[tuple[Planned, list[Tensor]]] = []
    for item in plan.shuffled([*eager, *graphs]):
        if isinstance(item, Graphs):
            item.replay()
            continue
        assert isinstance(item, Planned)
        outs = []
        for rank in ranks:
            x = rows[item.dtype].window(rank.rank, item.start, item.count, item.shifted)
            with torch.cuda.stream(rank.stream):
                outs.append(call(item.op, x, rank.group_name))
        made.append((item, outs))
    torch.cuda.synchronize()

    results = []
    for each in graphs:
        made += [(planned, [outs[place] for outs in each.outs]) for place, planned in enumerate(each.planned)]
    for planned, outs in made:
        for rank, out in enumerate(outs):
            expected = rows[planned.dtype].expected(planned.op, rank, planned.start, planned.count)
            results.append(compared(planned.op, f"{label}, rank {rank}, {planned}", out, expected))
    return differences(results)


def sequence(ctx: RankContext, world: int, calls: int, first_epoch: int) -> list[str]:
    """At least so many calls through one group of simulated ranks."""
    most = MOST_ELEMENTS[world]
    plan = Plan(world, most, seed=world)
    rows = {dtype: Rows(world, dtype, ctx.device, most + 8 * world) for dtype in DTYPES}
    options = {"max_size": MAX_SIZE[world], "one_shot_bytes": ONE_SHOT_BYTES, "first_epoch": first_epoch}
    with make_simulated(world, device=ctx.device.index or 0, **options) as ranks:
        graphs = [Graphs(ranks, plan, ctx.device) for _ in range(NUM_GRAPHS)]
        with capture_simulated(ranks):
            for each in graphs:
                each.capture()
        wrong: list[str] = []
        for number in range(-(-calls // BATCH)):
            wrong += batch_of_calls(ranks, plan, rows, graphs, ctx.device, f"batch {number}")
            wrong += [f"rank {rank.rank} after batch {number}: {rank.fault()}" for rank in ranks if rank.fault()]
            if wrong:
                break
        del graphs
    return wrong


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_long_sequence_of_everything(pools: Pools, world: int) -> None:
    assert_none_wrong(pools.of(1).run(sequence, world, CALLS[world], 0, deadline=120))


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("bits", [14, 16, 31, 32])
def test_epochs_may_pass_what_small_counters_hold(pools: Pools, bits: int, world: int) -> None:
    assert_none_wrong(pools.of(1).run(sequence, world, 60, 2**bits - 3, deadline=60))
