"""The all-reduce algorithms on simulated ranks of one GPU: microseconds a call in a CUDA graph, and the host's time.

There is no link in between, so these times compare kernels with kernels (sgl_comm/tools/simulated_timing.py).

    python benchmarks/bench_all_reduce.py --worlds 2 4 8 --algos one_shot two_shot --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from sgl_comm.testing import SimulatedRank, make_simulated
from sgl_comm.tools import command_line
from sgl_comm.tools.simulated_timing import Call, graph_microseconds


def call_of(algo: str) -> Call:
    """The op that a name stands for: an algorithm of V2, "v1", or "auto" for the front door."""
    ops = torch.ops.sgl_comm
    if algo in ("v1", "auto"):
        return ops.custom_all_reduce_v1 if algo == "v1" else ops.all_reduce
    return lambda x, group_name: ops.custom_all_reduce_v2(x, group_name, algo)


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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json and (why_not := command_line.why_not_written(options.json)):
        parser.error(f"--json: {why_not}")
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
        command_line.write(options.json, json.dumps(results, indent=1))


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
