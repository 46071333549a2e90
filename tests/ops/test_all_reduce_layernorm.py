"""tp_attn_all_reduce_and_layernorm: the bits of all_reduce followed by the norm, and how near those are to exact."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import difference
from helpers.errors import error_text
from helpers.graph_nodes import node_names
from helpers.ranks import Ranks, capturing, group_without_shared_memory, ranks_on
from helpers.values import DTYPES, generator, name_of
from sgl_comm import reference, testing
from sgl_comm.testing import RankContext

EPS = 1e-6
TOKENS = (0, 1, 2, 7, 32, 128)
WORLDS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Norm:
    """A norm and which weights it has."""

    name: str
    norm: str
    bias: bool = False
    weight_offset: float = 0.0


NORMS = (
    Norm("rms", "rms"),
    Norm("rms + offset", "rms", weight_offset=1.0),
    Norm("layer", "layer"),
    Norm("layer + bias", "layer", bias=True),
)


@dataclass(frozen=True)
class Case:
    """A call: weights are of fp32 where ``wide_weights``."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    norm: Norm
    wide_weights: bool = False

    def __str__(self) -> str:
        return name_of(self.norm.name, self.dtype, [self.tokens, self.hidden], "fp32 weights" * self.wide_weights)

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A rank's hidden states; the residual, the weight and the bias, the same on all ranks."""
        shape = (self.tokens, self.hidden)
        states = torch.randn(shape, generator=generator("layernorm", str(self), "of rank", rank)).to(self.dtype)
        random_bits = generator("layernorm", str(self))
        residual = (3 * torch.randn(shape, generator=random_bits)).to(self.dtype)
        weight, bias = (torch.randn(self.hidden, generator=random_bits) for _ in range(2))
        dtype = torch.float32 if self.wide_weights else self.dtype
        return states, residual, weight.to(dtype), bias.to(dtype) if self.norm.bias else None

    def call(self, states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> list[Tensor]:
        norm = self.norm
        return list(
            sgl_comm.ops.tp_attn_all_reduce_and_layernorm(
                states, residual, weight, bias, EPS, norm.norm, norm.weight_offset, group_name=group
            )
        )


def full_cross() -> Iterator[Case]:
    """Up to 128 tokens at four sizes of a row, one of them odd."""
    for hidden, tokens, dtype, norm in itertools.product((64, 576, 4096, 1027), TOKENS, DTYPES, NORMS):
        yield Case(tokens, hidden, dtype, norm)


def other_sizes() -> Iterator[Case]:
    """Also such as do not fill the threads of a cluster's blocks, and several rows for each of those."""
    sizes = (1, 384, 512, 2880, 4104, 5120, 5376, 7168, 7936, 8192, 8200, 12296, 16384, 16400)
    for hidden, dtype, norm in itertools.product(sizes, DTYPES, NORMS):
        yield Case(3, hidden, dtype, norm, wide_weights=hidden % 512 == 0)
    for tokens, hidden in ((9, 5376), (150, 5376), (140, 7936), (40, 12296), (60, 16384), (300, 4096)):
        for dtype, norm in zip(DTYPES, NORMS[1:], strict=True):
            yield Case(tokens, hidden, dtype, norm)


def many_tokens() -> Iterator[Case]:
    for dtype, norm in zip(DTYPES, NORMS[1:], strict=True):
        yield Case(2048, 4096, dtype, norm)


CROSSES = {"full cross": full_cross, "other sizes": other_sizes, "many tokens": many_tokens}


def checksum(tensors: list[Tensor]) -> int:
    return zlib.crc32(b"".join(tensor.view(torch.uint8).cpu().numpy().tobytes() for tensor in tensors))


def results_of_cases(ctx: RankContext, cross: str) -> tuple[list[str], list[int]]:
    """What is wrong with the cases that fall to this rank to look at; and a checksum of each case's results.

    The oracle gives the norm of what this run's all_reduce gave.
    """
    wrong, sums = [], []
    group = ctx.group.group_name
    for number, case in enumerate(CROSSES[cross]()):
        states, residual, weight, bias = case.inputs(ctx.rank)
        mine = states.to(ctx.device)
        others = [x if x is None else x.to(ctx.device) for x in (residual, weight, bias)]
        got = [x.cpu() for x in case.call(mine, *others, group)]
        total = torch.ops.sgl_comm.all_reduce(mine, group).cpu()
        sums.append(checksum([x for x in got if x.numel()]))
        if number % ctx.world != ctx.rank:
            continue
        norm = case.norm
        expected = reference.tp_attn_all_reduce_and_layernorm(
            [total], residual, weight, bias, EPS, norm.norm, norm.weight_offset
        )
        for name, x, y in zip(("normed", "new residual"), got, expected, strict=True):
            wrong += difference(x, y, f"{case}, {name}")
    return wrong, sums


@pytest.mark.parametrize("cross", ["full cross", "other sizes"])
@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, *WORLDS)), *ranks_on("cuda", WORLDS)])
def test_the_bits_are_those_of_an_all_reduce_and_a_norm(ranks: Ranks, cross: str) -> None:
    wrong, sums = zip(*ranks.run(results_of_cases, cross, deadline=200), strict=True)
    assert all(each == [] for each in wrong), wrong
    assert len(sums[0]) >= 100
    assert all(each == sums[0] for each in sums)


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (2, 8)), *ranks_on("cuda", (2, 8))])
def test_many_tokens(ranks: Ranks) -> None:
    wrong, sums = zip(*ranks.run(results_of_cases, "many tokens", deadline=200), strict=True)
    assert all(each == [] for each in wrong), wrong
    assert all(each == sums[0] for each in sums)


# --- how near to exact


def in_float64(case: Case, new_residual: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm in float64 of the new residual as it was rounded; and each row's largest term."""
    r = new_residual.double()
    if case.norm.norm == "layer":
        r = r - r.mean(-1, keepdim=True)
    factor = (r.square().mean(-1, keepdim=True) + EPS).rsqrt()
    scaled = r * factor * (weight.double() + case.norm.weight_offset)
    terms = scaled.abs() if bias is None else torch.maximum(scaled.abs(), bias.double().abs())
    return scaled + (0 if bias is None else bias.double()), terms.amax(-1, keepdim=True)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One ULP of ``dtype`` at each of these float64 values."""
    exponent = torch.frexp(values.abs().clamp_min(torch.finfo(dtype).smallest_normal))[1]
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponent - 1)


def distances(ctx: RankContext, dtype: torch.dtype) -> list[tuple[str, float, float, float]]:
    """For each norm: the fractions exactly rounded and within 1 ULP, and the largest distance in ULPs of its row."""
    found = []
    for norm, hidden in itertools.product(NORMS, (576, 4096)):
        case = Case(64, hidden, dtype, norm)
        states, residual, weight, bias = case.inputs(ctx.rank)
        normed, new_residual = case.call(states, residual, weight, bias, ctx.group.group_name)
        exact, largest = in_float64(case, new_residual, weight, bias)
        distance = (normed.double() - exact).abs()
        ulp, row_ulp = spacing(exact, dtype), spacing(largest, dtype)
        rounded = (normed == exact.to(dtype)).double().mean().item()
        found.append((str(case), rounded, (distance <= ulp).double().mean().item(), (distance / row_ulp).max().item()))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_near_to_exact(dtype: torch.dtype) -> None:
    for case, rounded, within_one, largest in Ranks("cpu", 2).run(distances, dtype)[0]:
        if dtype == torch.float32:
            assert largest <= 8, case
        else:
            assert rounded >= 0.99, (case, rounded)
            assert within_one >= 0.999, (case, within_one)
            assert largest <= 2, (case, largest)


# --- a token's own bits, layouts, values


def alone_and_in_a_batch(ctx: RankContext) -> list[str]:
    wrong = []
    for dtype, norm in itertools.product(DTYPES, NORMS):
        case = Case(9, 1536, dtype, norm)
        states, *others = case.inputs(ctx.rank)
        mine, group = states.to(ctx.device), ctx.group.group_name
        residual, weight, bias = (x if x is None else x.to(ctx.device) for x in others)
        batch = case.call(mine, residual, weight, bias, group)
        for first, last in ((0, 1), (4, 5), (8, 9), (2, 7)):
            some = case.call(mine[first:last], residual[first:last], weight, bias, group)
            for x, y in zip(some, batch, strict=True):
                wrong += difference(x, y[first:last], f"{case}, tokens {first} to {last}")
    return wrong


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (3,)), *ranks_on("cuda", (2, 5))])
def test_a_token_has_the_same_bits_alone_and_in_a_batch(ranks: Ranks) -> None:
    ranks.all_right(alone_and_in_a_batch)


def every_layout(ctx: RankContext) -> list[str]:
    """Each rank's tensors in layouts of its own; results are row-major, new, and the inputs are left alone."""
    wrong, group, shape = [], ctx.group.group_name, (3, 4, 40)
    layouts = [layout for layout in testing.layouts(shape).values() if not layout.overlaps]
    random_bits = generator("layouts")
    states = [torch.randn(shape, generator=random_bits) for _ in range(ctx.world)]
    residual, weight = torch.randn(shape, generator=random_bits), torch.randn(40, generator=random_bits)
    expected = reference.tp_attn_all_reduce_and_layernorm(states, residual, weight, None, EPS)
    states, expected = [[x.to(ctx.device) for x in tensors] for tensors in (states, expected)]
    residual, weight = residual.to(ctx.device), weight.to(ctx.device)
    for number, layout in enumerate(layouts):
        mine = layouts[(number + ctx.rank) % len(layouts)](states[ctx.rank])
        other = layout(residual)
        strided = weight.repeat_interleave(2)[::2] if number % 2 else torch.cat([weight[:1], weight])[1:]
        results = sgl_comm.ops.tp_attn_all_reduce_and_layernorm(
            mine.tensor, other.tensor, strided, None, EPS, group_name=group
        )
        for name, x, y in zip(("normed", "new residual"), results, expected, strict=True):
            wrong += difference(x, y, f"{layout.name}, {name}")
            if not x.is_contiguous():
                wrong.append(f"{layout.name}, {name}: not row-major")
        wrong += difference(mine.tensor, states[ctx.rank], f"{layout.name}, its input afterwards")
        wrong += difference(other.tensor, residual, f"{layout.name}, its residual afterwards")
    return wrong


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (3,)), *ranks_on("cuda", (3,))])
def test_every_layout(ranks: Ranks) -> None:
    ranks.all_right(every_layout)


def nodes_of_graphs(ctx: RankContext) -> list[str]:
    """What is wrong with the nodes that a call is in a captured graph."""
    fused, unfused = ["all_reduce_layernorm_kernel"], ["shot", "norm_kernel"]
    hopper = torch.cuda.get_device_capability(ctx.device) >= (9, 0)
    wrong = []
    for tokens, hidden, expected in (
        (1, 4096, fused), (7, 5376, fused), (40, 12296, fused), (200, 4096, fused), (5, 8192, fused), (3, 64, fused),
        (2, 1027, unfused), (2, 16392, unfused), (2048, 4096, unfused),
    ):  # fmt: skip
        if hidden > 4096 and not hopper:
            expected = unfused
        case = Case(tokens, hidden, torch.bfloat16, NORMS[0])
        mine, *others = (x if x is None else x.to(ctx.device) for x in case.inputs(ctx.rank))
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with capturing(graph):
            case.call(mine, *others, ctx.group.group_name)
        names = node_names(graph)
        if len(names) != len(expected) or any(part not in name for part, name in zip(expected, names, strict=True)):
            wrong.append(f"{case}: the graph holds {names}")
    return wrong


@pytest.mark.gpu
def test_what_can_be_fused_is_one_launch() -> None:
    Ranks("cuda", 2).all_right(nodes_of_graphs)


def awkward_rows(ctx: RankContext) -> list[str]:
    """Infinities, NaN, zeros of both signs, subnormals; also with subnormals flushed by the thread."""
    wrong = []
    for dtype, norm in itertools.product(DTYPES, NORMS):
        special = testing.special_values(dtype)
        rows = torch.stack([special.roll(shift) for shift in range(4)])
        rows = torch.cat([rows, torch.zeros_like(rows[:1]), -torch.zeros_like(rows[:1]), rows[:1] * 0 + 1])
        states = [rows.roll(rank, 0) for rank in range(ctx.world)]
        weight = torch.linspace(-2, 2, rows.size(-1)).to(dtype)
        bias = weight.flip(0) if norm.bias else None
        args = (rows.flip(0), weight, bias, EPS, norm.norm, norm.weight_offset)
        expected = reference.tp_attn_all_reduce_and_layernorm(states, *args)
        on_device = [x.to(ctx.device) if isinstance(x, Tensor) else x for x in args]
        for flushing in (False, True):
            torch.set_flush_denormal(flushing)
            got = sgl_comm.ops.tp_attn_all_reduce_and_layernorm(
                states[ctx.rank].to(ctx.device), *on_device, group_name=ctx.group.group_name
            )
            torch.set_flush_denormal(False)
            for x, y in zip(got, expected, strict=True):
                wrong += difference(x.cpu(), y, name_of(dtype, norm.name, "flushing" * flushing))
    return wrong


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (2,)), *ranks_on("cuda", (2, 3))])
def test_awkward_values(ranks: Ranks) -> None:
    ranks.all_right(awkward_rows)


def by_the_own_backend(ctx: RankContext) -> list[str]:
    """Through gloo, with values that any order sums alike."""
    wrong = []
    with group_without_shared_memory(ctx) as group:
        for dtype in DTYPES:
            states = [torch.randint(-3, 4, (5, 72), generator=generator(r)).to(dtype) for r in range(ctx.world)]
            residual, weight = states[0] + 1, torch.linspace(0.5, 2, 72)
            expected = reference.tp_attn_all_reduce_and_layernorm(states, residual, weight, None, EPS)
            args = (states[ctx.rank], residual, weight, None, EPS)
            got = sgl_comm.ops.tp_attn_all_reduce_and_layernorm(*args, group_name=group)
            for x, y in zip(got, expected, strict=True):
                wrong += difference(x, y, name_of("fallback", dtype))
    return wrong


def test_the_own_backend_serves_where_shared_memory_does_not() -> None:
    Ranks("cpu", 3).all_right(by_the_own_backend)


# --- what is refused


def refusals(ctx: RankContext) -> dict[str, str]:
    """Bad arguments on rank 0 alone; after each the ranks are in step still. What was bad -> the error of rank 0."""
    x, w, group = torch.ones(2, 8), torch.ones(8), ctx.group.group_name
    good = {"hidden_states": x, "residual": x, "weight": w, "bias": None, "eps": EPS, "group_name": group}
    bad = {
        "no dimension": {"hidden_states": torch.ones(()), "residual": torch.ones(())},
        "dtype": {"hidden_states": x.int(), "residual": x.int()},
        "residual's shape": {"residual": torch.ones(2, 9)},
        "residual's dimensions": {"residual": torch.ones(1, 2, 8)},
        "residual's dtype": {"residual": x.half()},
        "weight's size": {"weight": torch.ones(7)},
        "weight's dimensions": {"weight": torch.ones(1, 8)},
        "weight's dtype": {"weight": w.half()},
        "bias's size": {"bias": torch.ones(9), "norm": "layer"},
        "bias of rms": {"bias": w},
        "norm": {"norm": "batch"},
        "eps": {"eps": -1.0},
        "eps is NaN": {"eps": float("nan")},
        "weight_offset": {"weight_offset": float("inf")},
        "group": {"group_name": "nowhere"},
        "requires grad": {"hidden_states": x.clone().requires_grad_()},
        "weight requires grad": {"weight": w.clone().requires_grad_()},
        "sparse": {"residual": x.to_sparse()},
    }
    texts = {}
    for what, arguments in bad.items():
        if ctx.rank == 0:
            call = sgl_comm.ops.tp_attn_all_reduce_and_layernorm
            texts[what] = error_text(lambda arguments=arguments, call=call: call(**(good | arguments)))
        _, new_residual = sgl_comm.ops.tp_attn_all_reduce_and_layernorm(**good)
        if new_residual.unique().tolist() != [ctx.world + 1]:
            texts[what] = f"the call afterwards gave {new_residual.unique().tolist()}"
    return texts


WORDS = {
    "no dimension": "got hidden_states float32[] on cpu; expected at least one dimension",
    "dtype": "got hidden_states int32[2, 8] on cpu; expected float32, bfloat16 or float16",
    "residual's shape": "got residual float32[2, 9] on cpu; expected the shape, dtype and device of hidden_states",
    "residual's dimensions": "got residual float32[1, 2, 8] on cpu; expected the shape",
    "residual's dtype": "got residual float16[2, 8] on cpu; expected the shape",
    "weight's size": "got weight float32[7] on cpu; expected [8], of float32 or of the dtype of hidden_states",
    "weight's dimensions": "got weight float32[1, 8] on cpu; expected [8]",
    "weight's dtype": "got weight float16[8] on cpu; expected [8]",
    "bias's size": "got bias float32[9] on cpu; expected [8]",
    "bias of rms": "got a bias with norm 'rms'; expected none, or norm 'layer'",
    "norm": "got norm 'batch'; expected 'rms' or 'layer'",
    "eps": "got eps -1; expected a finite number, at least 0",
    "eps is NaN": "got eps nan; expected a finite number",
    "weight_offset": "got weight_offset inf; expected a finite number",
    "group": "unknown group 'nowhere'",
    "requires grad": "that requires grad; expected one that does not",
    "weight requires grad": "that requires grad; expected one that does not",
    "sparse": "got a tensor without strides",
}


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    first, second = Ranks("cpu", 2).run(refusals)
    assert second == {}
    assert first.keys() == WORDS.keys()
    for what, words in WORDS.items():
        assert first[what].startswith("sgl_comm::tp_attn_all_reduce_and_layernorm: "), first[what]
        assert words in first[what], first[what]


def differing_calls(ctx: RankContext) -> str:
    """Rank 1 sums where the others sum and normalise; an error on every rank."""
    x, w = torch.ones(4, 8), torch.ones(8)
    group = dist.new_group(list(range(ctx.world)))
    with sgl_comm.init(group) as comm:
        if ctx.rank == 1:
            text = error_text(lambda: comm.all_reduce(x))
        else:
            op = sgl_comm.ops.tp_attn_all_reduce_and_layernorm
            text = error_text(lambda: op(x, x, w, None, EPS, group_name=comm.group_name))
        dist.barrier(ctx.group)
    dist.destroy_process_group(group)
    return text


def test_ranks_that_differ_get_an_error_on_every_rank() -> None:
    for text in Ranks("cpu", 3).run(differing_calls, deadline=30):
        assert "called tp_attn_all_reduce_and_layernorm of 32 float32" in text, text
        assert "called all_reduce of 32 float32" in text, text
