"""The all-reduce algorithms on simulated ranks of one GPU: microseconds a call in a CUDA graph, and the host's time.

There is no link in between, so these times compare kernels with kernels. Each rank replays a graph of many calls on
its own stream; all start behind one gate; the slowest rank counts; the median over repetitions is printed.

    python benchmarks/bench_all_reduce.py --worlds 2 4 8 --algos one_shot two_shot --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from sgl_comm.testing import SimulatedRank, make_simulated

CALLS = 200
REPETITIONS = 15
NUM_BUFFERS = 4
GATE_CYCLES = 4_000_000

Call = Callable[[torch.Tensor, str], torch.Tensor]


def call_of(algo: str) -> Call:
    """The op that a name stands for: an algorithm of V2, "v1", or "auto" for the front door."""
    ops = torch.ops.sgl_comm
    if algo in ("v1", "auto"):
        return ops.custom_all_reduce_v1 if algo == "v1" else ops.all_reduce
    return lambda x, group_name: ops.custom_all_reduce_v2(x, group_name, algo)


def graph_microseconds(ranks: list[SimulatedRank], num_bytes: int, dtype: torch.dtype, call: Call) -> float:
    """The median time of a call of ``num_bytes`` bytes a rank, in a graph of ``CALLS`` calls on rotating buffers."""
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


def host_times(ranks: list[SimulatedRank]) -> dict[str, float]:
    """Host time of an eager all_reduce, and of torch.add, with grad mode off and on."""
    x = torch.randn(2048, device="cuda").bfloat16()
    times: dict[str, float] = {}
    for mode, context in (("inference_mode", torch.inference_mode), ("grad mode on", torch.enable_grad)):
        with context():
            for name, call in (
                ("torch.add", lambda: torch.add(x, x)),
                ("all_reduce", lambda: torch.ops.sgl_comm.all_reduce(x, ranks[0].group_name)),
            ):
                samples = []
                for _ in range(30):
                    torch.cuda.synchronize()
                    with torch.cuda.stream(ranks[0].stream):
                        start = time.perf_counter()
                        for _ in range(200):
                            call()
                        samples.append((time.perf_counter() - start) / 200 * 1e6)
                    if name == "all_reduce":
                        for rank in ranks[1:]:
                            with torch.cuda.stream(rank.stream):
                                for _ in range(200):
                                    torch.ops.sgl_comm.all_reduce(x, rank.group_name)
                times[f"{name}, {mode}"] = statistics.median(samples)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2])
    parser.add_argument("--algos", nargs="+", default=["one_shot", "two_shot"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << p for p in (10, 13, 14, 16, 18, 20)])
    parser.add_argument("--host", action="store_true", help="the host's time of an eager call too")
    parser.add_argument("--json")
    options = parser.parse_args()
    results: dict[str, object] = {"gpu": torch.cuda.get_device_name()}
    print(f"# {results['gpu']}, simulated ranks, bfloat16, microseconds")
    print(f"{'world':>5} {'bytes':>10} " + " ".join(f"{algo:>14}" for algo in options.algos), flush=True)
    for world in options.worlds:
        with make_simulated(world) as ranks, torch.inference_mode():
            for size in options.sizes:
                row = [graph_microseconds(ranks, size, torch.bfloat16, call_of(algo)) for algo in options.algos]
                results[f"{world} ranks, {size} bytes"] = dict(zip(options.algos, row, strict=True))
                print(f"{world:5d} {size:10d} " + " ".join(f"{time:14.2f}" for time in row), flush=True)
            if options.host:
                results[f"{world} ranks, host"] = host = host_times(ranks)
                for name, microseconds in host.items():
                    print(f"host, {name}: {microseconds:.2f} us")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
