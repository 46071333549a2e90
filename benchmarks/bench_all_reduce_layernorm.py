"""The fused op against all_reduce and a norm, on simulated ranks of one GPU: microseconds in a CUDA graph.

``unfused`` is all_reduce followed by the norm in a kernel of its own, which also adds the residual; ``all_reduce`` is
the sum alone.

    python benchmarks/bench_all_reduce_layernorm.py --worlds 2 4 8 --json out.json
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist

import sgl_comm
from sgl_comm.testing import make_simulated
from sgl_comm.tools.simulated_timing import Call, graph_microseconds

EPS = 1e-6


def calls_of(tokens: int, hidden: int, alone: str) -> dict[str, Call]:
    """What is compared, by name. ``alone`` names a group of one rank, whose fused op is a norm."""
    ops = torch.ops.sgl_comm
    residual = torch.randn(tokens, hidden, device="cuda").bfloat16()
    weight = torch.randn(hidden, device="cuda").bfloat16()

    def norm(x: torch.Tensor, group_name: str) -> torch.Tensor:
        return ops.tp_attn_all_reduce_and_layernorm(x, residual, weight, None, EPS, group_name=group_name)[0]

    return {
        "fused": lambda x, group_name: norm(x.view(tokens, hidden), group_name),
        "unfused": lambda x, group_name: norm(ops.all_reduce(x.view(tokens, hidden), group_name), alone),
        "all_reduce": ops.all_reduce,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--json")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results: dict[str, object] = {"gpu": torch.cuda.get_device_name()}
    print(f"# {results['gpu']}, simulated ranks, bfloat16, RMSNorm, microseconds")
    print(f"{'world':>5} {'hidden':>7} {'tokens':>7} {'fused':>10} {'unfused':>10} {'all_reduce':>10} {'ratio':>6}")
    with sgl_comm.init(device=torch.device("cuda", 0)) as alone:
        for world in options.worlds:
            with make_simulated(world) as ranks, torch.inference_mode():
                for hidden in options.hidden:
                    for tokens in options.tokens:
                        times = {
                            name: graph_microseconds(ranks, 2 * tokens * hidden, torch.bfloat16, call)
                            for name, call in calls_of(tokens, hidden, alone.group_name).items()
                        }
                        results[f"{world} ranks, {tokens} x {hidden}"] = times
                        columns = " ".join(f"{time:10.2f}" for time in times.values())
                        ratio = times["fused"] / times["unfused"]
                        print(f"{world:5d} {hidden:7d} {tokens:7d} {columns} {ratio:6.2f}", flush=True)
    dist.destroy_process_group()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
