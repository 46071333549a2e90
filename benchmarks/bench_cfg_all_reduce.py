"""cfg_all_reduce in place on strided tensors, against what callers do without it: contiguous(), all_reduce, copy_.

Between real ranks, in CUDA graphs on GPUs, both with this package's all_reduce. Microseconds, and their ratio.

    python benchmarks/bench_cfg_all_reduce.py --world 2
    torchrun --nproc-per-node 2 benchmarks/bench_cfg_all_reduce.py --sizes 64K 16M --json out.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgl_comm import ops, reference
from sgl_comm.testing import RankContext, wrong_elements
from sgl_comm.tools import bench, command_line, report, timing
from sgl_comm.tools.contenders import Contender

CHANNELS = 16
BUDGET_S = 2.0

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 1))[..., 1:-1],
}
"""Of [1, channels, height, width]."""


class Strided(Contender):
    """``call`` sums a tensor of this layout in place."""

    exact = True

    def __init__(self, name: str, lay_out: Callable[[Tensor], Tensor], call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.name, self.lay_out, self.call = name, lay_out, call

    def setup(self, x: Tensor, num_buffers: int) -> None:
        self.buffers = [self.lay_out(x.clone()) for _ in range(num_buffers)]
        self.turns = itertools.cycle(self.buffers)

    def run(self) -> Tensor:
        x = next(self.turns)
        self.call(x)
        return x


def contenders(lay_out: Callable[[Tensor], Tensor], group_name: str) -> list[Strided]:
    """The op, and the same by hand."""

    def by_hand(x: Tensor) -> None:
        copy = x.contiguous()
        ops.all_reduce_(copy, group_name)
        x.copy_(copy)

    return [
        Strided("cfg_all_reduce_", lay_out, lambda x: ops.cfg_all_reduce_(x, group_name)),
        Strided("by hand", lay_out, by_hand),
    ]


def measure(
    ctx: RankContext, sizes: Sequence[int], samples: int, dtype: torch.dtype
) -> dict[tuple[str, int], dict[str, float]]:
    """Times each layout and size, and checks it before; collective. Every rank returns the same."""
    assert ctx.comm is not None
    results = {}
    capture = ctx.comm.capture if bench.in_graphs(ctx.device.type, ctx.comm.backend) else None
    with torch.inference_mode():
        for (name, lay_out), size in itertools.product(LAYOUTS.items(), sizes):
            shape = shape_of(size // dtype.itemsize)
            everyone = contenders(lay_out, ctx.comm.group_name)
            wrong = sum(count_wrong(ctx, each, shape, dtype) for each in everyone)
            x = timing.timed_values(torch.Size(shape).numel(), dtype, ctx.device).view(shape)
            timings = timing.time_calls(everyone, x, ctx.group, samples, BUDGET_S, capture)
            times = {each.name: timed.median_us for each, timed in zip(everyone, timings, strict=True)}
            results[name, torch.Size(shape).numel() * dtype.itemsize] = {**times, "#wrong": wrong}
    return results


def shape_of(numel: int) -> tuple[int, int, int, int]:
    """Latents of about so many elements."""
    width = max(1, round((numel / CHANNELS) ** 0.5))
    return 1, CHANNELS, max(1, numel // CHANNELS // width), width


def count_wrong(ctx: RankContext, contender: Strided, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Wrong elements over all ranks on random data."""
    inputs = [torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(ctx.world)]
    contender.setup(inputs[ctx.rank].to(ctx.device), 1)
    return bench.sum_over_ranks(ctx, int(wrong_elements(contender.run().cpu(), reference.all_reduce(inputs)).sum()))


def main() -> int:
    """Runs the benchmark; 0 if all sums were right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_common_arguments(parser)
    parser.add_argument("--sizes", type=bench.parse_bytes, nargs="+", default=[16 << 10, 256 << 10, 4 << 20])
    parser.add_argument("--dtype", choices=list(bench.DTYPES), default="bfloat16")
    args = parser.parse_args()
    bench.check_common_arguments(args, parser)
    with bench.ranks_of(args) as ranks:
        found = ranks.measure(measure, args.sizes, args.iters, bench.DTYPES[args.dtype])
        setting = bench.setting_of(ranks, dtype=args.dtype)
    if ranks.leads:
        print_table(setting, found)
        rows = {f"{layout}, {size} bytes": times for (layout, size), times in found.items()}
        report.write_json(args.json, setting, rows)
    return int(any(times["#wrong"] for times in found.values()))


def print_table(setting: dict[str, object], found: dict[tuple[str, int], dict[str, float]]) -> None:
    """A line a layout and size; the ratio is the op's time over that by hand."""
    report.print_setting(setting)
    names = list(next(iter(found.values())))
    print(f"{'layout':>14} {'bytes':>10} " + " ".join(f"{name:>16}" for name in names) + f" {'ratio':>6}")
    for (layout, size), times in found.items():
        columns = " ".join(f"{report.rounded(time):>16}" for time in times.values())
        print(f"{layout:>14} {size:10d} {columns} {times['cfg_all_reduce_'] / times['by hand']:6.2f}")


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
