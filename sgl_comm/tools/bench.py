"""``python -m sgl_comm bench``: all-reduce of this package beside what torch has, in one run, checked bit for bit.

Run alone it starts its own ranks; under torchrun it is one of the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sgl_comm
from sgl_comm import reference
from sgl_comm.testing import RankContext, RankPool, wrong_elements
from sgl_comm.tools import command_line, report, timing
from sgl_comm.tools.contenders import Contender, contenders
from sgl_comm.tools.environment import environment
from sgl_comm.tools.report import Figures, Row

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

ALGORITHMS = ("one_shot", "two_shot", "one_shot_ring", "two_shot_ring")

_SIZE_DEADLINE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. ``samples`` a size, fewer where they would take longer than ``budget_s`` seconds."""

    dtype: str
    in_place: bool
    samples: int
    budget_s: float = 2.0
    algorithms: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench``."""
    add_common_arguments(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--min-bytes", type=parse_bytes, default="1K", metavar="BYTES")
    parser.add_argument("--max-bytes", type=parse_bytes, default="16M", metavar="BYTES")
    parser.add_argument("--factor", type=int, default=4, help="from one size to the next (default 4)")
    parser.add_argument("--sizes", type=parse_bytes, nargs="+", metavar="BYTES", help="these sizes instead")
    parser.add_argument(
        "--algos", nargs="+", choices=ALGORITHMS, default=[], help="these of the push kernels too, each by itself"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--in-place", dest="in_place", action="store_true", default=True, help="the default")
    form.add_argument("--out-of-place", dest="in_place", action="store_false")
    parser.set_defaults(main=functools.partial(main, parser=parser))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every benchmark that runs on ranks."""
    parser.add_argument("--world", type=int, help="ranks to start (default 2; under torchrun it decides)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there are two GPUs, else cpu")
    parser.add_argument("--iters", type=int, default=50, help="samples of each figure (default 50)")
    parser.add_argument(
        "--no-bind", dest="bind", action="store_false", help="let the system move CPU ranks among cores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")


def check_common_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends the program if the common arguments cannot be."""
    if args.iters < 1:
        parser.error("--iters must be at least 1")
    if args.json and (why_not := command_line.why_not_written(args.json)):
        parser.error(f"--json: {why_not}")
    if args.world is not None and args.world < 1:
        parser.error("--world must be at least 1")
    if args.device == "cuda" and torch.cuda.device_count() == 0:
        parser.error("--device cuda: torch sees no GPU")


def parse_bytes(text: str) -> int:
    """Bytes from a number with an optional K, M or G (powers of 1024)."""
    number, factor = text.upper().removesuffix("B"), 1
    if number and number[-1] in "KMG":
        factor = 1024 ** ("KMG".index(number[-1]) + 1)
        number = number[:-1]
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number above 0 with an optional K, M or G")
    return int(number) * factor


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the benchmark; 0 if every element of every result was right, else 1."""
    check_common_arguments(args, parser)
    if args.factor < 2:
        parser.error("--factor must be at least 2")
    if args.algos and args.device != "cuda":
        parser.error("--algos goes with --device cuda alone")
    if args.min_bytes > args.max_bytes:
        parser.error("--min-bytes must not be above --max-bytes")

    options = Options(args.dtype, args.in_place, args.iters, algorithms=tuple(args.algos))
    sizes = args.sizes or list(_steps(args.min_bytes, args.max_bytes, args.factor))
    with ranks_of(args) as ranks:
        setting = setting_of(ranks, dtype=args.dtype, form="in place" if args.in_place else "out of place")
        table = report.Table(setting) if ranks.leads else None
        rows: list[Row] = []
        for number, size in enumerate(sizes):
            with report.progress(ranks.leads, f"size {number + 1} of {len(sizes)}: {size} bytes"):
                rows.append(ranks.measure(measure, options, size))
            if table is not None:
                table.add(rows[-1])
    if table is not None:
        table.finish(rows)
        report.write_json(args.json, setting, [report.to_json(row) for row in rows])
    return int(any(row.wrong for row in rows))


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a benchmark, as this process sees them.

    ``leads``: whether this process prints. ``binding``: how ranks are bound to cores, in words. ``measure(fn, *args)``
    calls fn(ctx, *args) on all ranks and gives rank 0's result.
    """

    world: int
    device: str
    leads: bool
    binding: str
    measure: Callable[..., Any]


def setting_of(ranks: Ranks, **more: object) -> dict[str, Any]:
    """What figures are measured on: the machine, the ranks, and what else the benchmark says. A collective call."""
    return {
        **environment(), "world": ranks.world, "device": ranks.device, "backend": ranks.measure(backend_of),
        "ranks": ranks.binding, **more,
    }  # fmt: skip


def ranks_of(args: argparse.Namespace) -> AbstractContextManager[Ranks]:
    """Torchrun's ranks, where it has started this process; else new ones, as the common arguments want them."""
    return _torchrun_ranks(args) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else _own_ranks(args)


@contextlib.contextmanager
def _own_ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    world = args.world or 2
    device = args.device or ("cuda" if world >= 2 and torch.cuda.device_count() >= 2 else "cpu")
    _start_fork_server()
    with RankPool(world, device) as pool:
        bound = device == "cpu" and args.bind and all(pool.run(bind_to_a_core))
        binding = "bound to a core each" if bound else "not bound"
        yield Ranks(world, device, True, binding, lambda fn, *a: pool.run(fn, *a, deadline=_SIZE_DEADLINE_S)[0])


def _start_fork_server() -> None:
    """Starts the process that the ranks are forked from, before they are: Ctrl-C in a terminal goes to all of them."""
    multiprocessing.set_forkserver_preload(["sgl_comm.testing"])
    multiprocessing.resource_tracker.ensure_running()  # ends by letting Ctrl-C through
    with command_line.interrupts_held():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _torchrun_ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    kind = args.device or ("cuda" if gpus >= local >= 2 else "cpu")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % gpus)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" and local <= gpus else "gloo")
    try:
        group = dist.group.WORLD
        assert group is not None
        with sgl_comm.init(group, device=device) as comm:
            ctx = RankContext(dist.get_rank(), dist.get_world_size(), device, group, comm)
            yield Ranks(ctx.world, kind, ctx.rank == 0, "as torchrun placed them", lambda fn, *a: fn(ctx, *a))
    finally:
        _contenders.cache_clear()  # a gloo group that outlives the interpreter aborts the process
        dist.destroy_process_group()


def _steps(first: int, last: int, factor: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= factor


def bind_to_a_core(ctx: RankContext) -> bool:
    """Gives the rank's own thread a core to itself, as launchers do; False where there are fewer cores than ranks.

    Threads that the rank has started before, as gloo's, stay where the system puts them.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ctx.world:
        return False
    os.sched_setaffinity(0, {cores[ctx.rank]})
    return True


def backend_of(ctx: RankContext) -> str:
    """What serves this rank's communicator."""
    assert ctx.comm is not None
    return ctx.comm.backend


def in_graphs(device: str, backend: str) -> bool:
    """Whether calls on such a device, served by this backend, are timed in CUDA graphs: gloo's cannot be captured."""
    return device == "cuda" and backend != "gloo"


@functools.lru_cache(maxsize=1)
def _contenders(ctx: RankContext, in_place: bool, algorithms: tuple[str, ...]) -> list[Contender]:
    assert ctx.comm is not None
    return contenders(ctx.group, ctx.comm.group_name, ctx.device, in_place, algorithms)


def measure(ctx: RankContext, options: Options, num_bytes: int) -> Row:
    """Checks, times and checks again, for one size; collective. Every rank returns the same row."""
    assert ctx.comm is not None
    dtype = DTYPES[options.dtype]
    numel = max(1, num_bytes // dtype.itemsize)
    everyone = _contenders(ctx, options.in_place, options.algorithms)
    wrong_before = [_count_wrong(ctx, each, numel, dtype, seed=1) for each in everyone]
    able = [each for each, wrong in zip(everyone, wrong_before, strict=True) if wrong is not None]

    torch.manual_seed(ctx.rank)
    x = timing.timed_values(numel, dtype, ctx.device)
    capture = ctx.comm.capture if in_graphs(ctx.device.type, ctx.comm.backend) else None
    timings = timing.time_calls(able, x, ctx.group, options.samples, options.budget_s, capture)

    figures = []
    for each, each_timing in zip(able, timings, strict=True):
        wrong = wrong_before[everyone.index(each)] or 0
        wrong += _count_wrong(ctx, each, numel, dtype, seed=2) or 0
        figures.append(Figures.make(each.name, each_timing, numel * dtype.itemsize, ctx.world, wrong))
        each.close()
    ctx.comm.check()
    return Row(numel * dtype.itemsize, numel, options.dtype, "sum", figures[0], tuple(figures[1:]))


def _count_wrong(ctx: RankContext, contender: Contender, numel: int, dtype: torch.dtype, seed: int) -> int | None:
    """Wrong elements over all ranks on random data; None, on every rank, if a competitor cannot do this size."""
    generator = torch.Generator(device=ctx.device)
    inputs = []
    for rank in range(ctx.world):
        generator.manual_seed(seed * 1000 + rank)
        inputs.append(torch.randn(numel, device=ctx.device, generator=generator).to(dtype))
    try:
        contender.setup(inputs[ctx.rank], 1)
        able = 1
    except (RuntimeError, AttributeError, TypeError):  # also where torch has no such thing
        able = 0
    if sum_over_ranks(ctx, able) != ctx.world:
        return None
    try:
        result = contender.run()
    except RuntimeError:
        if contender.exact:
            raise
        able = 0
    if sum_over_ranks(ctx, able) != ctx.world:
        return None
    if contender.exact:
        wrong = wrong_elements(result, reference.all_reduce(inputs))
    else:
        exact, size = (sum(x.float() for x in terms) for terms in (inputs, [x.abs() for x in inputs]))
        wrong = (result.float() - exact).abs() > ctx.world * torch.finfo(dtype).eps * size
    return sum_over_ranks(ctx, int(wrong.sum()))


def sum_over_ranks(ctx: RankContext, value: int) -> int:
    """The total of every rank's number; collective."""
    total = torch.tensor(value)
    dist.all_reduce(total, group=ctx.group)
    return int(total)
