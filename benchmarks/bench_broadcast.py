"""cfg_broadcast in place beside the broadcast of NCCL or gloo, between real ranks, in CUDA graphs on GPUs.

From rank 0 alone, which need not wait for its peers, and from one rank after the other, each of which has waited for
the one before. Microseconds a call, the slowest rank's.

    python benchmarks/bench_broadcast.py --world 2
    torchrun --nproc-per-node 2 benchmarks/bench_broadcast.py --sizes 1K 1M 64M --json out.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sgl_comm import ops
from sgl_comm.testing import RankContext
from sgl_comm.tools import bench, command_line, report, timing
from sgl_comm.tools.contenders import Contender, peer_group

BUDGET_S = 2.0
SOURCES = {"rank 0": lambda world: [0], "by turns": lambda world: list(range(world))}


class Broadcast(Contender):
    """``call`` sends a tensor from a rank to all, in place."""

    exact = True

    def __init__(self, name: str, sources: Sequence[int], call: Callable[[Tensor, int], object]) -> None:
        super().__init__()
        self.name, self.call = name, call
        self.sources: Iterator[int] = itertools.cycle(sources)

    def run(self) -> Tensor:
        x = next(self.turns)
        self.call(x, next(self.sources))
        return x


def contenders(
    sources: Sequence[int], group_name: str, theirs: tuple[str, dist.ProcessGroup] | None
) -> list[Broadcast]:
    """The op, and torch's own of a group that can."""
    everyone = [Broadcast("cfg_broadcast_", sources, lambda x, src: ops.cfg_broadcast_(x, src, group_name))]
    if theirs is not None:
        name, group = theirs
        everyone.append(Broadcast(name, sources, lambda x, src: dist.broadcast(x, group=group, group_src=src)))
    return everyone


def measure(ctx: RankContext, sizes: Sequence[int], samples: int) -> dict[tuple[str, int], dict[str, float]]:
    """Times each size of an even number of bytes, and checks it before; collective. Every rank returns the same."""
    assert ctx.comm is not None
    results = {}
    capture = ctx.comm.capture if bench.in_graphs(ctx.device.type, ctx.comm.backend) else None
    theirs = peer_group(ctx.group, ctx.device)
    with torch.inference_mode():
        for (name, sources_of), size in itertools.product(SOURCES.items(), sizes):
            everyone = contenders(sources_of(ctx.world), ctx.comm.group_name, theirs)
            wrong = sum(count_wrong(ctx, each, size) for each in everyone)
            x = torch.zeros(size // 2, dtype=torch.bfloat16, device=ctx.device)
            timings = timing.time_calls(everyone, x, ctx.group, samples, BUDGET_S, capture)
            times = {each.name: timed.median_us for each, timed in zip(everyone, timings, strict=True)}
            results[name, size] = {**times, "#wrong": wrong}
    return results


def count_wrong(ctx: RankContext, contender: Broadcast, size: int) -> int:
    """Wrong bytes over all ranks, of a call from each source."""
    wrong = 0
    first = next(contender.sources)
    sources = [first, *itertools.takewhile(lambda src: src != first, contender.sources)]
    for src in sources:
        values = [torch.arange(size) * (3 + rank) % 251 + rank for rank in range(ctx.world)]
        x = values[ctx.rank].to(ctx.device, torch.uint8)
        contender.call(x, src)
        wrong += bench.sum_over_ranks(ctx, int((x.cpu() != values[src].to(torch.uint8)).sum()))
    return wrong


def main() -> int:
    """Runs the benchmark; 0 if all bytes were right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_common_arguments(parser)
    parser.add_argument("--sizes", type=bench.parse_bytes, nargs="+", default=[16 << 10, 256 << 10, 4 << 20])
    args = parser.parse_args()
    bench.check_common_arguments(args, parser)
    with bench.ranks_of(args) as ranks:
        found = ranks.measure(measure, args.sizes, args.iters)
        setting = bench.setting_of(ranks)
    if ranks.leads:
        print_table(setting, found)
        rows = {f"{way}, {size} bytes": times for (way, size), times in found.items()}
        report.write_json(args.json, setting, rows)
    return int(any(times["#wrong"] for times in found.values()))


def print_table(setting: dict[str, object], found: dict[tuple[str, int], dict[str, float]]) -> None:
    """A line for each way and size."""
    report.print_setting(setting)
    names = list(next(iter(found.values())))
    print(f"{'from':>10} {'bytes':>10} " + " ".join(f"{name:>16}" for name in names))
    for (way, size), times in found.items():
        print(f"{way:>10} {size:10d} " + " ".join(f"{report.rounded(time):>16}" for time in times.values()))


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
