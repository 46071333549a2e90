"""How calls on simulated ranks of one GPU are timed: kernels against kernels, since no NVLink is between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from sgl_comm.testing import SimulatedRank

CALLS = 200
REPETITIONS = 15
NUM_BUFFERS = 4
GATE_CYCLES = 4_000_000

Call = Callable[[torch.Tensor, str], torch.Tensor]
"""Of an input and a group's name."""


def graph_microseconds(ranks: Sequence[SimulatedRank], num_bytes: int, dtype: torch.dtype, call: Call) -> float:
    """The median time of a call of ``num_bytes`` bytes a rank, in a graph of ``CALLS`` calls on rotating buffers.

    Each rank replays its graph on its own stream; all start when one gate opens; the slowest rank counts.

    Raises:
        RuntimeError: a rank's group has failed.
    """
    count = num_bytes // dtype.itemsize
    inputs = [[torch.randn(count, device="cuda").to(dtype) for _ in range(NUM_BUFFERS)] for _ in ranks]
    graphs = []
    for rank, buffers in zip(ranks, inputs, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream):
            outputs: list[torch.Tensor | None] = [None] * NUM_BUFFERS
            for number in range(CALLS):
                slot = number % NUM_BUFFERS
                outputs[slot] = call(buffers[slot], rank.group_name)
        graphs.append(graph)
    torch.cuda.synchronize()
    gate = torch.cuda.Stream()
    times = []
    for _ in range(REPETITIONS + 2):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in ranks]
        with torch.cuda.stream(gate):
            torch.cuda._sleep(GATE_CYCLES)
            opened = torch.cuda.Event()
            opened.record()
        for rank, graph, (begin, end) in zip(ranks, graphs, events, strict=True):
            with torch.cuda.stream(rank.stream):
                rank.stream.wait_event(opened)
                begin.record()
                graph.replay()
                end.record()
        torch.cuda.synchronize()
        times.append(max(begin.elapsed_time(end) for begin, end in events) * 1e3 / CALLS)
    faults = [rank.fault() for rank in ranks if rank.fault()]
    if faults:
        raise RuntimeError(faults[0])
    return statistics.median(times[2:])
