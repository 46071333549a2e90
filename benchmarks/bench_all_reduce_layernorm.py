"""The fused op against all_reduce and a norm, in microseconds: between real ranks, or on simulated ranks of one GPU.

``unfused`` is all_reduce followed by the norm in a kernel of its own, which also adds the residual. Real ranks, in CUDA
graphs on GPUs, have it once more with NCCL's or gloo's sum; simulated ones have the sum alone, ``all_reduce``.

    python benchmarks/bench_all_reduce_layernorm.py --world 2
    torchrun --nproc-per-node 8 benchmarks/bench_all_reduce_layernorm.py --tokens 1 32 --json out.json
    python benchmarks/bench_all_reduce_layernorm.py --simulated 2 4 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from sgl_comm import reference
from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.testing import RankContext, make_simulated, wrong_elements
from sgl_comm.tools import bench, command_line, report, timing
from sgl_comm.tools.contenders import Contender, peer_group
from sgl_comm.tools.simulated_timing import Call, graph_microseconds

EPS = 1e-6
BOUND = 0.05
"""How far another library's norm may be from ours, as a part of the largest number."""
BUDGET_S = 2.0

Results = dict[str, dict[str, float]]
"""Microseconds, by what was called and by whom; real ranks also have "#wrong"."""


class Summed(Contender):
    """A sum over ranks and its norm: ``call`` of an input. ``exact``: it must have the oracle's bits."""

    def __init__(self, name: str, call: Callable[[Tensor], Tensor], exact: bool) -> None:
        super().__init__()
        self.name, self.call, self.exact = name, call, exact

    def run(self) -> Tensor:
        return self.call(next(self.turns))


def norm_of(tokens: int, hidden: int, device: torch.device | str, dtype: torch.dtype) -> tuple[Call, Tensor, Tensor]:
    """The fused op of an input and a group's name, and its residual and weight; alike on all ranks."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, hidden), (hidden,)
    residual, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)

    def norm(x: Tensor, group_name: str) -> Tensor:
        args = (x, residual, weight, None, EPS)
        return torch.ops.sgl_comm.tp_attn_all_reduce_and_layernorm(*args, group_name=group_name)[0]

    return norm, residual, weight


def calls_of(tokens: int, hidden: int, alone: str) -> dict[str, Call]:
    """What is compared on simulated ranks, by name. ``alone`` names a group of one rank, whose fused op is a norm."""
    ops = torch.ops.sgl_comm
    norm, _, _ = norm_of(tokens, hidden, "cuda", torch.bfloat16)
    return {
        "fused": lambda x, group_name: norm(x.view(tokens, hidden), group_name),
        "unfused": lambda x, group_name: norm(ops.all_reduce(x.view(tokens, hidden), group_name), alone),
        "all_reduce": ops.all_reduce,
    }


def contenders_of(norm: Call, groups: LayerGroups, peer: tuple[str, dist.ProcessGroup] | None) -> list[Summed]:
    """What is compared between real ranks."""
    together, alone = groups.tp.group_name, groups.alone.group_name
    everyone = [
        Summed("fused", lambda x: norm(x, together), True),
        Summed("unfused", lambda x: norm(torch.ops.sgl_comm.all_reduce(x, together), alone), True),
    ]
    if peer is not None:
        name, group = peer

        def summed_by_peer(x: Tensor) -> Tensor:
            dist.all_reduce(x, group=group)
            return norm(x, alone)

        everyone.append(Summed(f"{name} and norm", summed_by_peer, False))
    return everyone


def measure(
    ctx: RankContext, shapes: Sequence[tuple[int, int]], samples: int, dtype: torch.dtype
) -> dict[tuple[int, int], dict[str, float]]:
    """Times each shape (tokens, hidden), and checks it before; collective. Every rank returns the same."""
    peer = peer_group(ctx.group, ctx.device)
    results = {}
    with LayerGroups(ParallelConfig(ctx.world), ctx.group, ctx.device) as groups, torch.inference_mode():
        for tokens, hidden in shapes:
            norm, *arrays = norm_of(tokens, hidden, ctx.device, dtype)
            everyone = contenders_of(norm, groups, peer)
            wrong = sum(count_wrong(ctx, each, *arrays) for each in everyone)
            x = timing.timed_values(tokens * hidden, dtype, ctx.device).view(tokens, hidden)
            capture = groups.capture if bench.in_graphs(ctx.device.type, groups.tp.backend) else None
            timings = timing.time_calls(everyone, x, ctx.group, samples, BUDGET_S, capture)
            times = {each.name: timed.median_us for each, timed in zip(everyone, timings, strict=True)}
            results[tokens, hidden] = {**times, "#wrong": wrong}
        groups.tp.check()
    return results


def count_wrong(ctx: RankContext, contender: Summed, residual: Tensor, weight: Tensor) -> int:
    """Wrong elements over all ranks on random data."""
    inputs = []
    for rank in range(ctx.world):
        generator = torch.Generator().manual_seed(rank)
        inputs.append(torch.randn(residual.shape, generator=generator).to(residual.dtype))
    expected, _ = reference.tp_attn_all_reduce_and_layernorm(inputs, residual.cpu(), weight.cpu(), None, EPS)
    contender.setup(inputs[ctx.rank].to(ctx.device), 1)
    result = contender.run().cpu()
    if contender.exact:
        wrong = wrong_elements(result, expected)
    else:
        wrong = ~((result.float() - expected.float()).abs() <= BOUND * expected.float().abs().max())
    return bench.sum_over_ranks(ctx, int(wrong.sum()))


def print_row(world: int, tokens: int, hidden: int, times: dict[str, float]) -> None:
    """A line of the table."""
    columns = " ".join(f"{report.rounded(time):>14}" for time in times.values())
    print(f"{world:5d} {hidden:7d} {tokens:7d} {columns} {times['fused'] / times['unfused']:6.2f}", flush=True)


def print_heads(names: Sequence[str]) -> None:
    """The heads of the table's columns."""
    print(f"{'world':>5} {'hidden':>7} {'tokens':>7} " + " ".join(f"{name:>14}" for name in names) + f" {'ratio':>6}")


def simulate(worlds: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Results:
    """Times simulated ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results: Results = {}
    print(f"# {torch.cuda.get_device_name()}, simulated ranks, bfloat16, RMSNorm, microseconds")
    print_heads(["fused", "unfused", "all_reduce"])
    with sgl_comm.init(device=torch.device("cuda", 0)) as alone:
        for world in worlds:
            with make_simulated(world) as ranks, torch.inference_mode():
                for tokens, hidden in shapes:
                    calls = calls_of(tokens, hidden, alone.group_name)
                    size = (2 * tokens * hidden, torch.bfloat16)
                    times = {name: graph_microseconds(ranks, *size, call) for name, call in calls.items()}
                    results[f"{world} ranks, {tokens} x {hidden}"] = times
                    print_row(world, tokens, hidden, times)
    dist.destroy_process_group()
    return results


def main() -> int:
    """Runs the benchmark; 0 if all norms were right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_common_arguments(parser)
    parser.add_argument("--simulated", type=int, nargs="+", metavar="WORLD", help="simulated ranks, so many")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--dtype", choices=list(bench.DTYPES), default="bfloat16", help="of real ranks")
    args = parser.parse_args()
    bench.check_common_arguments(args, parser)
    shapes = [(tokens, hidden) for hidden in args.hidden for tokens in args.tokens]
    if args.simulated:
        report.write_json(args.json, {"gpu": torch.cuda.get_device_name()}, simulate(args.simulated, shapes))
        return 0
    with bench.ranks_of(args) as ranks:
        found = ranks.measure(measure, shapes, args.iters, bench.DTYPES[args.dtype])
        setting = bench.setting_of(ranks, dtype=args.dtype, norm="RMSNorm")
    if ranks.leads:
        report.print_setting(setting)
        print_heads(list(next(iter(found.values()))))
        for (tokens, hidden), times in found.items():
            print_row(ranks.world, tokens, hidden, times)
        report.write_json(
            args.json, setting, {f"{tokens} x {hidden}": times for (tokens, hidden), times in found.items()}
        )
    return int(any(times["#wrong"] for times in found.values()))


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
