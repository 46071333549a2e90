"""torch.compile: compiled code equals eager, and every call stays, in its place, without copies."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import Compared, differences
from sgl_comm.testing import RankContext, RankPool

all_reduce = torch.ops.sgl_comm.all_reduce
all_reduce_ = torch.ops.sgl_comm.all_reduce_
reduce_scatter = torch.ops.sgl_comm.reduce_scatter
all_gather = torch.ops.sgl_comm.all_gather
tp_attn_all_reduce_and_layernorm = torch.ops.sgl_comm.tp_attn_all_reduce_and_layernorm

Groups = Sequence[str]
Result = tuple[Tensor, ...]


def two_sums(x: Tensor, y: Tensor, groups: Groups) -> Result:
    total = all_reduce(x * 2, groups[0])
    return (all_reduce(total + 1, groups[1]) + x,)


def no_arithmetic(x: Tensor, y: Tensor, groups: Groups) -> Result:
    return all_reduce(x, groups[0]), all_reduce(y, groups[1])


def unused_results(x: Tensor, y: Tensor, groups: Groups) -> Result:
    all_reduce(x, groups[0])
    all_reduce(y, groups[1])
    return (x * 2,)


def two_equal_calls(x: Tensor, y: Tensor, groups: Groups) -> Result:
    return all_reduce(x, groups[0]), all_reduce(x, groups[0])


def two_equal_unused_calls(x: Tensor, y: Tensor, groups: Groups) -> Result:
    all_reduce(y, groups[2])
    all_reduce(y, groups[2])
    return (y + 1,)


def results_used_in_another_order(x: Tensor, y: Tensor, groups: Groups) -> Result:
    a = all_reduce(x, groups[0])
    b = all_reduce(y, groups[1])
    c = all_reduce(x + 1, groups[2])
    d = all_reduce(y * 2, groups[0])
    return d * 2, c, b.amax(0), a


def chains_of_different_sizes(x: Tensor, y: Tensor, groups: Groups) -> Result:
    """Where memory is saved by running one chain before the other."""
    wide = all_reduce(x.repeat(64, 64), groups[0])
    b = all_reduce(y, groups[1])
    c = all_reduce(wide.amax(1), groups[2])
    wide_too = all_reduce(y.repeat(64, 64), groups[1])
    d = all_reduce(b, groups[0])
    return d, c, wide_too.amax(0)


def in_place_on_a_local(x: Tensor, y: Tensor, groups: Groups) -> Result:
    local = x * 2
    all_reduce_(local, groups[0])
    all_reduce_(local, groups[1])
    return (local,)


def in_place_on_the_inputs(x: Tensor, y: Tensor, groups: Groups) -> Result:
    all_reduce_(x, groups[0])
    all_reduce_(y, groups[1])
    all_reduce_(x, groups[2])
    return ()


def in_place_on_views(x: Tensor, y: Tensor, groups: Groups) -> Result:
    all_reduce_(x[0], groups[0])
    all_reduce_(x.t(), groups[1])
    return (x + 1,)


def functional_and_in_place(x: Tensor, y: Tensor, groups: Groups) -> Result:
    a = all_reduce(x, groups[0])
    b = all_reduce(y, groups[1])
    all_reduce_(x, groups[2])
    c = all_reduce(x, groups[0])
    all_reduce_(y, groups[1])
    return a, b, c


def in_place_before_functional(x: Tensor, y: Tensor, groups: Groups) -> Result:
    all_reduce_(x, groups[2])
    b = all_reduce(y, groups[1])
    all_reduce_(y, groups[0])
    all_reduce(x, groups[1])
    return (b + 1,)


def halves_of_a_sum(x: Tensor, y: Tensor, groups: Groups) -> Result:
    share = reduce_scatter(x, groups[0])
    a = all_gather(share * 2, groups[1])
    b = all_reduce(y, groups[2])
    return all_gather(y, groups[0]), a, b


def unused_halves(x: Tensor, y: Tensor, groups: Groups) -> Result:
    reduce_scatter(x, groups[0])
    all_gather(y, groups[1])
    all_gather(y, groups[1])
    reduce_scatter(x, groups[2])
    return (y + 1,)


def every_op_used_in_another_order(x: Tensor, y: Tensor, groups: Groups) -> Result:
    a = all_gather(x, groups[0])
    b = reduce_scatter(x + 1, groups[1])
    all_reduce_(y, groups[2])
    c = all_reduce(x, groups[0])
    d = all_gather(y.t(), groups[1])
    e = reduce_scatter(a, groups[2])
    return e, d * 2, c, b


def norms_among_sums(x: Tensor, y: Tensor, groups: Groups) -> Result:
    a, r = tp_attn_all_reduce_and_layernorm(x, x + 1, x[0], None, 1e-6, group_name=groups[0])
    b = all_reduce(y, groups[1])
    tp_attn_all_reduce_and_layernorm(y, b, y[1], y[0], 1e-6, "layer", group_name=groups[2])
    c, s = tp_attn_all_reduce_and_layernorm(a, r, x[1], None, 1e-6, group_name=groups[1])
    return s, b, c


def chains_of_halves(x: Tensor, y: Tensor, groups: Groups) -> Result:
    """Where memory is saved by running one chain before the other."""
    wide = all_gather(x.repeat(64, 64), groups[0])
    b = all_gather(y, groups[1])
    c = reduce_scatter(wide, groups[2]).amax(1)
    d = reduce_scatter(b, groups[0])
    return d, c


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, the groups it calls in the order of its lines, and how many kernels its own arithmetic needs."""

    fn: Callable[[Tensor, Tensor, Groups], Result]
    groups: tuple[int, ...]
    kernels: int
    copies: int = 0
    """Of results into inputs that the function changes."""
    more_on_gpu: int = 0
    """Kernels more: Triton's half of a long reduction that Inductor splits in two."""


CASES = {
    case.fn.__name__: case
    for case in (
        Case(two_sums, (0, 1), kernels=3),
        Case(no_arithmetic, (0, 1), kernels=0),
        Case(unused_results, (0, 1), kernels=1),
        Case(two_equal_calls, (0, 0), kernels=0),
        Case(two_equal_unused_calls, (2, 2), kernels=1),
        Case(results_used_in_another_order, (0, 1, 2, 0), kernels=4),
        Case(chains_of_different_sizes, (0, 1, 2, 1, 0), kernels=4, more_on_gpu=1),
        Case(in_place_on_a_local, (0, 1), kernels=1),
        Case(in_place_on_the_inputs, (0, 1, 2), kernels=0, copies=2),
        Case(in_place_on_views, (0, 1), kernels=3, copies=2),
        Case(functional_and_in_place, (0, 1, 2, 0, 1), kernels=0, copies=2),
        Case(in_place_before_functional, (2, 1, 0, 1), kernels=1, copies=2),
        Case(halves_of_a_sum, (0, 1, 2, 0), kernels=1),
        Case(unused_halves, (0, 1, 1, 2), kernels=1),
        Case(every_op_used_in_another_order, (0, 1, 2, 0, 1, 2), kernels=2, copies=1),
        Case(chains_of_halves, (0, 1, 2, 0), kernels=2),
        Case(norms_among_sums, (0, 1, 2, 1), kernels=1),
    )
}


def arguments(ctx: RankContext, seed: int, sizes: tuple[int, int] = (8, 5)) -> tuple[Tensor, Tensor]:
    """Values that a sum of the wrong two calls would not give."""
    random_bits = torch.Generator().manual_seed(100 * seed + ctx.rank)
    x, y = torch.randn(4, sizes[0], generator=random_bits), torch.randn(3, sizes[1], generator=random_bits)
    return x.to(ctx.device), y.to(ctx.device)


def three_groups(ctx: RankContext) -> list[str]:
    """Names of three groups of all ranks."""
    assert ctx.comm is not None
    names = [ctx.comm.group_name]
    for _ in range(2):
        group = dist.new_group(list(range(ctx.world)))
        _opened.append(sgl_comm.init(group, ctx.device))
        names.append(group.group_name)
    return names


_opened: list[sgl_comm.Communicator] = []
"""Keeps a rank's communicators for the life of its process, as an engine does."""

_groups: list[str] = []


def groups_of(ctx: RankContext) -> list[str]:
    if not _groups:
        _groups.extend(three_groups(ctx))
    return _groups


def use_fresh_cache(folder: str, ctx: RankContext) -> None:
    """Nothing compiled before, by this rank or another, is found again."""
    place = Path(folder) / f"rank{ctx.rank}"
    place.mkdir()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
    torch._dynamo.reset()


def calls_in(code: str, groups: Groups) -> list[int]:
    """Which groups the generated code calls, in its order."""
    calls = re.findall(r"torch\.ops\.sgl_comm\.\w+\.default\((.*)", code)
    found = [[text for text in re.findall(r"'([^']*)'", call) if text in groups] for call in calls]
    assert all(len(names) == 1 for names in found), code
    return [list(groups).index(name) for (name,) in found]


def bodies(codes: Sequence[str]) -> str:
    """What the compiled function does, line by line, comments left out."""
    text = "\n".join(code.partition("def call(")[2].partition("\nrunner = ")[0] for code in codes)
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))


def wrong_results(label: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[str]:
    if len(actual) != len(expected):
        return [f"{label}: got {len(actual)} results, expected {len(expected)}"]
    return differences(
        Compared(f"{label}, tensor {number}", got, want, strides=want.stride())
        for number, (got, want) in enumerate(zip(actual, expected, strict=True))
    )


def compiled_like_eager(ctx: RankContext, name: str, folder: str) -> list[str]:
    """Compiled on all ranks, then on one rank alone: a call out of order would get another call of the peers."""
    from torch._inductor.utils import run_and_get_code

    case, groups = CASES[name], groups_of(ctx)
    use_fresh_cache(folder, ctx)
    x, y = arguments(ctx, seed=1)
    eager = [*case.fn(x, y, groups), x, y]

    x, y = arguments(ctx, seed=1)
    compiled = torch.compile(case.fn, fullgraph=True)
    results, codes = run_and_get_code(compiled, x, y, groups)
    wrong = wrong_results("compiled", [*results, x, y], eager)
    body = bodies(codes)
    seen = calls_in(body, groups)
    if seen != list(case.groups):
        wrong.append(f"calls in the generated code: groups {seen}, expected {list(case.groups)}")
    kernels = re.findall(r"^\s*((?:cpp|triton)_\w+)[.(]", body, re.MULTILINE)
    copies = [line for line in body.splitlines() if "copy" in line or "clone" in line]
    expected = case.kernels + (case.more_on_gpu if ctx.device.type == "cuda" else 0)
    if len(kernels) > expected + case.copies or len(copies) > case.copies:
        wrong.append(f"got kernels {kernels} and copies {copies}, expected {expected} and {case.copies}")

    for alone in range(ctx.world):
        if seen != list(case.groups):
            break  # the ranks would wait for each other in vain
        for seed in (2, 3):
            x, y = arguments(ctx, seed)
            eager = [*case.fn(x, y, groups), x, y]
            x, y = arguments(ctx, seed)
            fn = compiled if ctx.rank == alone else case.fn
            wrong += wrong_results(f"compiled on rank {alone} alone", [*fn(x, y, groups), x, y], eager)
    return wrong


def found_again_in_the_cache(ctx: RankContext, folder: str) -> list[str]:
    """Compiled a second time, from Inductor's cache on disk."""
    from torch._inductor.utils import run_and_get_code

    case, groups = CASES["results_used_in_another_order"], groups_of(ctx)
    use_fresh_cache(folder, ctx)
    wrong = []
    for turn in ("first", "second"):
        torch._dynamo.reset()
        x, y = arguments(ctx, seed=4)
        eager = case.fn(x, y, groups)
        results, codes = run_and_get_code(torch.compile(case.fn, fullgraph=True), x, y, groups)
        wrong += wrong_results(turn, results, eager)
        if codes and calls_in(bodies(codes), groups) != list(case.groups):
            wrong.append(f"{turn}: calls {calls_in(bodies(codes), groups)}")
    return wrong


def dynamic_shapes(ctx: RankContext, folder: str) -> list[str]:
    """One graph for several shapes, dtypes apart; also inputs that are not row-major."""
    groups = groups_of(ctx)
    use_fresh_cache(folder, ctx)
    wrong = []
    for dtype, name in (
        (torch.float32, "two_sums"),
        (torch.bfloat16, "functional_and_in_place"),
        (torch.float16, "every_op_used_in_another_order"),
    ):
        compiled = torch.compile(CASES[name].fn, fullgraph=True, dynamic=True)
        for turn, sizes in enumerate(((8, 5), (13, 9), (200, 31), (7, 3))):
            x, y = (value.to(dtype) for value in arguments(ctx, turn, sizes))
            eager = [*CASES[name].fn(x, y, groups), x, y]
            x, y = (value.to(dtype) for value in arguments(ctx, turn, sizes))
            with torch._dynamo.config.patch(error_on_recompile=turn > 0):
                wrong += wrong_results(f"{name} {dtype} {sizes}", [*compiled(x, y, groups), x, y], eager)
    transposed = torch.compile(CASES["two_sums"].fn, fullgraph=True)
    x, y = (value.t() for value in arguments(ctx, 9))
    wrong += wrong_results("transposed", transposed(x, y, groups), CASES["two_sums"].fn(x, y, groups))
    return wrong


def dynamic_rows(ctx: RankContext, folder: str) -> list[str]:
    """One graph for several numbers of rows, if each share has two at least; other numbers are the op's own error."""
    groups = groups_of(ctx)
    use_fresh_cache(folder, ctx)

    def fn(x: Tensor) -> Result:
        share = reduce_scatter(x * 2, groups[0])
        return share, all_gather(share, groups[1]), all_gather(x, groups[2])

    wrong = []
    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    for turn, rows in enumerate((4, 6, 30, 12)):
        x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(10 * rows + ctx.rank)).to(ctx.device)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            wrong += wrong_results(f"{rows} rows", compiled(x), fn(x))
    for name, x in (("rows", torch.ones(3, 5)), ("no dimension", torch.ones(()))):
        try:
            compiled(x.to(ctx.device))
            wrong.append(f"{name}: no error")
        except Exception as error:
            if "sgl_comm::reduce_scatter: got " not in str(error):
                wrong.append(f"{name}: {error}")
    return wrong


def wrappers_and_communicator(ctx: RankContext, folder: str) -> list[str]:
    """The typed wrappers and the Communicator's methods are traced too; other reduce ops keep their place."""
    assert ctx.comm is not None
    comm, groups = ctx.comm, groups_of(ctx)

    def fn(x: Tensor) -> Result:
        a = sgl_comm.ops.all_reduce(x, groups[1])
        b = comm.all_reduce(x * 2)
        sgl_comm.ops.all_reduce_(b, groups[2])
        c = sgl_comm.ops.reduce_scatter(x, groups[1])
        d = sgl_comm.ops.all_gather(c, groups[2])
        return a, b, sgl_comm.ops.all_reduce(x, groups[0], "max"), d, comm.reduce_scatter(x), comm.all_gather(c)

    use_fresh_cache(folder, ctx)
    x, _ = arguments(ctx, seed=5)
    return wrong_results("wrappers", torch.compile(fn, fullgraph=True)(x), fn(x))


def refusal_of_grad(ctx: RankContext, folder: str) -> list[str]:
    use_fresh_cache(folder, ctx)
    x = torch.ones(4, requires_grad=True)
    texts = []
    group = groups_of(ctx)[0]
    for op in (all_reduce, all_reduce_, reduce_scatter, all_gather):
        torch._dynamo.reset()
        try:
            torch.compile(lambda x, op=op: op(x, group), fullgraph=True, backend="aot_eager")(x)
            texts.append("no error")
        except Exception as error:
            texts.append(str(error))
    return texts


def opchecked(ctx: RankContext) -> None:
    """torch's own checks of schema, fake, autograd and tracing; each rank makes the same calls."""
    group = ctx.group.group_name
    x = torch.randn(4, 6, device=ctx.device)
    for tensor in (x, x.t(), x[1:, ::2], torch.empty(0, device=ctx.device), x.bfloat16()):
        torch.library.opcheck(torch.ops.sgl_comm.all_reduce.default, (tensor, group))
        torch.library.opcheck(torch.ops.sgl_comm.all_reduce_.default, (tensor.clone(), group))
        torch.library.opcheck(torch.ops.sgl_comm.all_gather.default, (tensor, group))
        torch.library.opcheck(torch.ops.sgl_comm.cfg_all_reduce.default, (tensor, group))
        torch.library.opcheck(torch.ops.sgl_comm.cfg_all_reduce_.default, (tensor.clone(), group))
        torch.library.opcheck(torch.ops.sgl_comm.cfg_broadcast.default, (tensor, 0, group))
        torch.library.opcheck(torch.ops.sgl_comm.cfg_broadcast_.default, (tensor.clone(), 0, group))
        if ctx.device.type == "cuda":
            torch.library.opcheck(torch.ops.sgl_comm.custom_all_reduce_v1.default, (tensor, group))
            torch.library.opcheck(torch.ops.sgl_comm.custom_all_reduce_v2.default, (tensor, group))
    torch.library.opcheck(torch.ops.sgl_comm.all_reduce.default, (x, group), {"reduce_op": "max"})
    ones = torch.ones(6, device=ctx.device)
    for states, norm in ((x, "rms"), (x.half(), "layer"), (x[:0], "rms"), (x.view(6, 4).t(), "layer")):
        torch.library.opcheck(
            torch.ops.sgl_comm.tp_attn_all_reduce_and_layernorm.default,
            (states, states.clone(), ones, ones if norm == "layer" else None, 1e-6, norm),
            {"group_name": group},
        )
    for tensor in (x, x.t(), x[:2, ::2], torch.empty(0, 3, device=ctx.device), x.half(), x.int()):
        torch.library.opcheck(torch.ops.sgl_comm.reduce_scatter.default, (tensor, group))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        torch.library.opcheck(torch.ops.sgl_comm.all_gather.default, (x.to(dtype), group))


def cuda_graphs(ctx: RankContext, folder: str) -> list[str]:
    """Inductor's own CUDA graphs: taken, and right when they are replayed with other inputs."""
    from torch._dynamo.utils import counters

    case, groups = CASES["results_used_in_another_order"], groups_of(ctx)
    use_fresh_cache(folder, ctx)
    counters.clear()
    compiled = torch.compile(case.fn, fullgraph=True, mode="reduce-overhead")
    wrong = []
    for seed in range(6):
        x, y = arguments(ctx, seed)
        eager = case.fn(x, y, groups)
        torch.compiler.cudagraph_mark_step_begin()
        results = [result.clone() for result in compiled(x, y, groups)]
        wrong += wrong_results(f"call {seed}", results, eager)
    skips = counters["inductor"]["cudagraph_skips"]
    return [*wrong, f"CUDA graphs were skipped {skips} times"] if skips else wrong


POOL_ENV = {"SGLCOMM_TIMEOUT": "20"}


@pytest.fixture(scope="module")
def pool_of() -> Iterator[Callable[[str], RankPool]]:
    """Two ranks on a device, kept for the module and made anew after a failure."""
    pools: dict[str, RankPool] = {}

    def of(device: str) -> RankPool:
        if device not in pools or not pools[device].usable:
            pools[device] = RankPool(2, device, env=POOL_ENV)
        return pools[device]

    yield of
    for pool in pools.values():
        pool.close()


PoolOf = Callable[[str], RankPool]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_compiled_code_keeps_every_call_in_its_place(pool_of: PoolOf, device: str, name: str, tmp_path: Path) -> None:
    assert pool_of(device).run(compiled_like_eager, name, str(tmp_path), deadline=120) == [[], []]


@pytest.mark.gpu
def test_compiled_code_takes_cuda_graphs(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of("cuda").run(cuda_graphs, str(tmp_path), deadline=120) == [[], []]


def test_code_from_the_cache_keeps_every_call_in_its_place(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of("cpu").run(found_again_in_the_cache, str(tmp_path), deadline=120) == [[], []]


def test_dynamic_shapes_equal_eager_with_one_graph(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of("cpu").run(dynamic_shapes, str(tmp_path), deadline=120) == [[], []]


def test_dynamic_rows_equal_eager_with_one_graph(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of("cpu").run(dynamic_rows, str(tmp_path), deadline=120) == [[], []]


def test_the_wrappers_can_be_compiled(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of("cpu").run(wrappers_and_communicator, str(tmp_path), deadline=120) == [[], []]


def test_an_input_that_requires_grad_is_refused_while_compiling(pool_of: PoolOf, tmp_path: Path) -> None:
    for texts in pool_of("cpu").run(refusal_of_grad, str(tmp_path), deadline=60):
        assert all("inference-only" in text for text in texts), texts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck_passes_for_every_op(pool_of: PoolOf, device: str) -> None:
    pool_of(device).run(opchecked, deadline=120)


def test_the_grafter_op_is_refused() -> None:
    """A compiled graph that is run again could not reach the other system."""
    op = torch.ops.sgl_comm.grafter_broadcast_
    with pytest.raises(Exception, match=r"grafter_broadcast_: got a call under torch\.compile; expected an eager one"):
        torch.compile(lambda x: op(x, 0, "any"), fullgraph=True, backend="aot_eager")(torch.ones(3))


def test_the_list_of_checked_ops_is_complete() -> None:
    public = {name for name in torch._C._dispatch_get_all_op_names() if re.match(r"sgl_comm::[a-z]", name)}
    names = {
        "all_reduce",
        "all_reduce_",
        "custom_all_reduce_v1",
        "custom_all_reduce_v2",
        "reduce_scatter",
        "all_gather",
        "cfg_all_reduce",
        "cfg_all_reduce_",
        "cfg_broadcast",
        "cfg_broadcast_",
        "grafter_broadcast_",  # refused: see above
        "tp_attn_all_reduce_and_layernorm",
    }
    assert public == {f"sgl_comm::{name}" for name in names}
