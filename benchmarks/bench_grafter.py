"""What the grafter costs: a call that moves nothing, and a tensor moved beside a plain broadcast of the same backend.

Rank 0 is the baseline and rank 1 the target, with a group of the grafter's own; beside it, in the same processes,
torch's broadcast over gloo, and ``cfg_broadcast_`` through shared memory (CPU). In mode "graft" the target's tensor is
compared and overwritten; that is in the grafter's time. Microseconds a call, the slower rank's.

    python benchmarks/bench_grafter.py --sizes 64K 1M 64M
"""

from __future__ import annotations

import argparse
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sgl_comm import ops
from sgl_comm.grafter import Grafter, GrafterConfig
from sgl_comm.testing import RankContext
from sgl_comm.tools import bench, command_line, report, timing
from sgl_comm.tools.contenders import Contender

BUDGET_S = 4.0
DTYPES = ("float32", "bfloat16")
BACKENDS = ("gloo", "shm")
CALLS = 200_000


class InPlace(Contender):
    """A call that gives the target the baseline's tensor."""

    exact = True

    def __init__(self, name: str, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.name, self.call = name, call

    def run(self) -> Tensor:
        x = next(self.turns)
        self.call(x)
        return x


@contextmanager
def grafter_of(ctx: RankContext, backend: str, folder: str) -> Iterator[Grafter]:
    """This rank's side: the baseline is rank 0's."""
    port = torch.zeros(1, dtype=torch.int64)
    if ctx.rank == 0:
        port += free_port()
    dist.broadcast(port, group=ctx.group, group_src=0)
    config = GrafterConfig(
        enable=True, role=("baseline", "target")[ctx.rank], rank=0, baseline_world_size=1, target_world_size=1,
        master_address="127.0.0.1", master_port=int(port), b2t_filter="name == 'x'", backend=backend, strict=True,
        report_dir=folder, timeout=60,
    )  # fmt: skip
    with Grafter(config) as grafter:
        yield grafter


def free_port() -> int:
    """A port that nobody listens at now."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


def measure_moves(
    ctx: RankContext, sizes: Sequence[int], samples: int, folder: str
) -> dict[tuple[str, str, int], dict[str, float]]:
    """Times each backend, dtype and size, and checks it; collective. Every rank returns the same."""
    assert ctx.comm is not None
    name = ctx.comm.group_name
    plain = {
        "gloo": lambda x: dist.broadcast(x, group=ctx.group, group_src=0),
        "shm": lambda x: ops.cfg_broadcast_(x, 0, name),
    }
    results = {}
    with torch.inference_mode():
        for backend in BACKENDS if ctx.device.type == "cpu" else BACKENDS[:1]:
            with grafter_of(ctx, backend, folder) as grafter:
                everyone = [
                    InPlace("plain", plain[backend]),
                    InPlace("grafter", lambda x, grafter=grafter: grafter.dump("x", x)),
                ]
                for dtype in DTYPES:
                    for size in sizes:
                        results[backend, dtype, size] = measure(ctx, everyone, getattr(torch, dtype), size, samples)
    return results


def measure(
    ctx: RankContext, everyone: Sequence[InPlace], dtype: torch.dtype, size: int, samples: int
) -> dict[str, float]:
    """Times of both, their ratio (the grafter's rate over the plain one's), and wrong bytes over all ranks."""
    values = [
        torch.randn(size // dtype.itemsize, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in (0, 1)
    ]
    wrong = 0
    for each in everyone:
        x = values[ctx.rank].to(ctx.device, copy=True)
        each.call(x)
        wrong += bench.sum_over_ranks(ctx, int((x.cpu() != values[0]).sum()))
    timings = timing.time_eager(everyone, values[ctx.rank].to(ctx.device), ctx.group, samples, BUDGET_S)
    times = {each.name: timed.median_us for each, timed in zip(everyone, timings, strict=True)}
    return {**times, "rate": report.significant(times["plain"] / times["grafter"]), "#wrong": wrong}


def measure_calls(ctx: RankContext, folder: str) -> dict[str, float]:
    """Nanoseconds of calls that move nothing, beside an empty method's."""
    value = torch.ones(3)
    tags = {"name": "y", "layer": 3}
    config = GrafterConfig(
        enable=True, role="target", rank=0, baseline_world_size=1, target_world_size=1, master_address="127.0.0.1",
        master_port=1, b2t_filter="name == 'x' and layer == 3", report_dir=folder,
    )  # fmt: skip
    calls = {}
    for state, grafter in (("disabled", Grafter(GrafterConfig())), ("enabled, unmatched", Grafter(config))):
        calls[f"maybe_intercept, {state}"] = lambda grafter=grafter: grafter.maybe_intercept(value=value, tags=tags)
        calls[f"dump, {state}"] = lambda grafter=grafter: grafter.dump("y", value, layer=3)
    empty = min(timeit.repeat(lambda: None, number=CALLS, repeat=5)) / CALLS
    return {
        name: report.significant((min(timeit.repeat(call, number=CALLS, repeat=5)) / CALLS - empty) * 1e9)
        for name, call in calls.items()
    }


def main() -> int:
    """Runs the benchmark; 0 if all bytes were right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_common_arguments(parser)
    parser.add_argument("--sizes", type=bench.parse_bytes, nargs="+", default=[64 << 10, 1 << 20, 64 << 20])
    parser.set_defaults(bind=False)  # gloo's threads need cores
    args = parser.parse_args()
    bench.check_common_arguments(args, parser)
    if args.world not in (None, 2):
        parser.error("--world must be 2: a baseline and a target")
    with tempfile.TemporaryDirectory() as folder, bench.ranks_of(args) as ranks:
        calls = ranks.measure(measure_calls, folder)
        moves = ranks.measure(measure_moves, args.sizes, args.iters, folder)
        setting = bench.setting_of(ranks)
    if ranks.leads:
        print_tables(setting, calls, moves)
        rows = {f"{backend}, {dtype}, {size} bytes": figures for (backend, dtype, size), figures in moves.items()}
        report.write_json(args.json, setting, {"calls, ns": calls, **rows})
    return int(any(figures["#wrong"] for figures in moves.values()))


def print_tables(
    setting: dict[str, object], calls: dict[str, float], moves: dict[tuple[str, str, int], dict[str, float]]
) -> None:
    """A line for each call, then one for each backend, dtype and size."""
    report.print_setting(setting)
    for name, nanoseconds in calls.items():
        print(f"# {name}: {nanoseconds:g} ns a call")
    names = list(next(iter(moves.values())))
    print(f"{'backend':>8} {'dtype':>9} {'bytes':>10} " + " ".join(f"{name:>10}" for name in names))
    for (backend, dtype, size), figures in moves.items():
        values = " ".join(f"{report.rounded(figure):>10}" for figure in figures.values())
        print(f"{backend:>8} {dtype:>9} {size:10d} {values}")


if __name__ == "__main__":
    raise SystemExit(command_line.run(main))
