"""cfg_all_reduce between real processes: all_reduce's bits for every layout, in place in the caller's own tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

import sgl_comm
from helpers.calls import CfgAllReduce, run_every_layout
from helpers.compare import difference
from helpers.errors import error_text
from helpers.graph_nodes import node_names
from helpers.ranks import CPU_WORLDS, Ranks, capturing, group_without_shared_memory, ranks_on, synchronize
from helpers.values import DTYPES, name_of
from sgl_comm.testing import RankContext
from sgl_comm.work import Work

SHAPES = ((), (0,), (4, 0), (1,), (7,), (10, 100), (5, 10, 20), (2, 4, 10, 13), (2, 3, 2, 4, 3), (3, 50_001))

every_world = pytest.mark.parametrize("ranks", [*ranks_on("cpu", CPU_WORLDS), *ranks_on("cuda", (2, 3, 4, 8))])
some_worlds = pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3)), *ranks_on("cuda", (2, 3))])


def whole_numbers(ctx: RankContext) -> list[str]:
    """What the package does not sum by itself, and groups that it does not serve: any order gives these bits."""
    wrong = []
    with group_without_shared_memory(ctx) as other:
        for group, dtypes in ((ctx.group.group_name, (torch.int64,)), (other, (torch.int64, torch.float32))):
            for shape in ((), (0,), (5, 10, 20), (2, 4, 10, 13)):
                for dtype in dtypes:
                    wrong += sums_of_whole_numbers(ctx, group, shape, dtype)
    return wrong


def sums_of_whole_numbers(ctx: RankContext, group: str, shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    count = torch.empty(shape, device="meta").numel()
    every = [(torch.arange(count).view(shape) * 3 + rank).to(ctx.device, dtype) for rank in range(ctx.world)]
    wrong = []
    for async_op in (False, True):
        x = every[ctx.rank].clone()
        if shape:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        work = sgl_comm.ops.cfg_all_reduce_(x, group, async_op=async_op)
        assert isinstance(work, Work) is async_op
        assert not isinstance(work, Work) or work.wait() is None
        wrong += difference(x, torch.stack(every).sum(0).to(dtype), name_of(dtype, shape, async_op))
    largest = sgl_comm.ops.cfg_all_reduce(every[ctx.rank], group, "max")
    wrong += difference(largest, every[-1], name_of("max", dtype, shape))
    return wrong


def refusals(ctx: RankContext) -> dict[str, str]:
    """Bad arguments on every rank: what was bad -> the error. After each, calls work."""
    name, x = ctx.group.group_name, torch.ones(4, 3, device=ctx.device)
    ops = sgl_comm.ops
    bad = {
        "reduce_op": lambda: ops.cfg_all_reduce(x, name, "mean"),
        "grad": lambda: ops.cfg_all_reduce_(x.clone().requires_grad_(), name),
        "overlap": lambda: ops.cfg_all_reduce_(x[:1].expand(4, 3), name),
        "async overlap": lambda: ops.cfg_all_reduce_(x[:1].expand(4, 3), name, async_op=True),
        "sparse": lambda: ops.cfg_all_reduce(x.to_sparse(), name),
        "unknown group": lambda: ops.cfg_all_reduce(x, "nowhere"),
    }
    texts = {}
    for what, call in bad.items():
        texts[what] = error_text(call)
        total = ops.cfg_all_reduce(x, name)
        if total.unique().tolist() != [ctx.world]:
            texts[what] = f"the call afterwards gave {total.unique().tolist()}"
    return texts


def errors_where_rank_0_differs(ctx: RankContext, how: str) -> list[str]:
    """Every rank sums ones and then thousands, but rank 0 passes another tensor first: of the same shape and dtype, on
    the other device, overlapping itself, or both. Returns each call's error, one of a third call, and sums that are
    wrong.
    """
    group = dist.new_group(list(range(ctx.world)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLCOMM_TIMEOUT", "1")
        comm = sgl_comm.init(group, ctx.device)
    device = torch.device("cpu") if how.startswith("cuda") else ctx.device
    tensors = [torch.full((1000,), value, device=device) for value in (1.0, 1000.0)]
    passed = list(tensors)
    if ctx.rank == 0:
        other, overlap = how.removesuffix("overlap").strip(), how.endswith("overlap")
        passed[0] = passed[0].to(other or device)
        passed[0] = passed[0][:1].expand(1000) if overlap else passed[0]
    texts = [error_text(lambda x=x: comm.cfg_all_reduce_(x)) for x in passed]
    synchronize(ctx)
    texts.append(error_text(lambda: comm.cfg_all_reduce(tensors[1])))
    for x, value in zip(passed, (1.0, 1000.0), strict=True):
        left = {number for number in x.tolist() if number == number} - {value}
        texts += [f"got {left} for {value}"] if left else []
    dist.barrier(ctx.group)
    comm.close()
    dist.destroy_process_group(group)
    return texts


CALLS = {
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "cfg_all_reduce": lambda comm, x: comm.cfg_all_reduce(x),
    "all_reduce_": lambda comm, x: comm.all_reduce_(x),
    "cfg_all_reduce_": lambda comm, x: comm.cfg_all_reduce_(x),
    "cfg_broadcast": lambda comm, x: comm.cfg_broadcast(x, 0),
    "cfg_broadcast_": lambda comm, x: comm.cfg_broadcast_(x, 0),
}
"""Of a communicator and a tensor."""


def copies(ctx: RankContext) -> dict[str, int]:
    """How often the library copies for the sake of a layout: what was called -> copies."""
    assert ctx.comm is not None
    found = {}
    for name, call in CALLS.items():
        for layout, x in (
            ("row-major", torch.ones(3, 5)),
            ("offset", torch.ones(16)[1:]),
            ("strided", torch.ones(3, 5).t()),
        ):
            before = torch.ops.sgl_comm._layout_copies()
            call(ctx.comm, x)
            found[f"{name}, {layout}"] = torch.ops.sgl_comm._layout_copies() - before
    return found


@every_world
def test_every_layout_in_place_and_not(ranks: Ranks) -> None:
    ranks.all_right(run_every_layout, CfgAllReduce, SHAPES, DTYPES)


@pytest.mark.parametrize("ranks", [*ranks_on("cpu", (1, 2, 3, 4)), *ranks_on("cuda", (2,))])
def test_other_dtypes_and_groups_without_shared_memory(ranks: Ranks) -> None:
    ranks.all_right(whole_numbers)


WORDS = (
    "rank 0 has refused a call that rank",
    "for rank 0, which never came",
    "rank 0 has made a cfg_ call of CUDA tensors that rank",
    "a call of CPU tensors of this group has failed before",
)


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        *(pytest.param(*param.values, "overlap", marks=param.marks) for param in ranks_on("cpu", (2, 3))),
        *(
            pytest.param(*param.values, how, marks=param.marks)
            for how in ("overlap", "cpu", "cuda", "cpu overlap", "cuda overlap")
            for param in ranks_on("cuda", (2, 3))
        ),
    ],
)
def test_where_one_rank_passes_another_tensor_no_sum_is_wrong(ranks: Ranks, how: str) -> None:
    for rank, texts in enumerate(ranks.run(errors_where_rank_0_differs, how, deadline=60)):
        assert len(texts) == 3, texts
        if how.endswith("overlap"):
            assert ("in which several elements share memory" in texts[0]) == (rank == 0), texts
        assert any(words in texts[2] for words in WORDS), texts


SERVED_AT_ONCE = {
    "row-major": lambda x: x[:1000],
    "row-major, large": lambda x: x[:1_000_000],
    "offset": lambda x: x[1:1001],
    "offset, large": lambda x: x[1:1_000_001],
    "transposed": lambda x: x[:1000].view(25, 40).t(),
    "sliced": lambda x: x[:1000].view(10, 10, 10)[1:-1, 1:-1, 1:-1],
    "stepped": lambda x: x[:1200].view(5, 6, 5, 8)[::2, ::2, ::2, ::2],
    "sliced rows, large": lambda x: x[:300_000].to(torch.bfloat16).view(300, 1000)[:, :500],
}
"""Tensors of which a call is one kernel."""
COPIED = {
    "transposed, large": lambda x: x[:1_000_000].view(1000, 1000).t(),
    "five dimensions": lambda x: x[:2048].view(4, 4, 4, 4, 8)[::2, ::2, ::2, ::2, ::2],
}


def nodes_of_graphs(ctx: RankContext) -> dict[tuple[str, str], list[str]]:
    """What each call with each tensor is in a captured graph."""
    assert ctx.comm is not None
    found = {}
    for (name, call), (layout, lay_out) in itertools.product(CALLS.items(), (SERVED_AT_ONCE | COPIED).items()):
        x = lay_out(torch.ones(1_000_001, device=ctx.device))
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with capturing(graph):
            call(ctx.comm, x)
        found[name, layout] = node_names(graph)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_a_tensor_is_one_launch_unless_copies_are_faster(world: int) -> None:
    for rank, found in enumerate(Ranks("cuda", world).run(nodes_of_graphs)):
        assert len(found) == len(CALLS) * (len(SERVED_AT_ONCE) + len(COPIED))
        for (name, layout), nodes in found.items():
            about = f"rank {rank}, {name}, {layout}: the graph holds {nodes}"
            kernel = "broadcast_kernel" if "broadcast" in name else "shot"
            assert sum(kernel in node for node in nodes) == 1, about
            receives = name == "cfg_broadcast" and rank > 0
            copies = layout in COPIED and not receives
            assert len(nodes) == 1 + copies * (2 if name.endswith("reduce_") else 1), about


def test_a_row_major_tensor_is_not_copied_and_a_strided_one_is() -> None:
    for rank, found in enumerate(Ranks("cpu", 2).run(copies)):
        strided = {"cfg_broadcast": 0, "cfg_broadcast_": 1}
        strided |= {"all_reduce": 1, "all_reduce_": 2, "cfg_all_reduce": 1, "cfg_all_reduce_": 2}
        expected = {f"{name}, {layout}": 0 for name in strided for layout in ("row-major", "offset")}
        expected |= {f"{name}, strided": count for name, count in strided.items()}
        assert found == expected, f"rank {rank}"


@some_worlds
def test_what_every_rank_refuses_leaves_the_group_as_it_was(ranks: Ranks) -> None:
    words = {
        "reduce_op": "sgl_comm::cfg_all_reduce: got reduce_op 'mean'; expected one of sum, ",
        "grad": "sgl_comm::cfg_all_reduce_: got float32[4, 3] on cpu that requires grad; expected one that does not",
        "overlap": "sgl_comm::cfg_all_reduce_: got float32[4, 3] on cpu in which several elements share memory",
        "async overlap": "sgl_comm::cfg_all_reduce_: got float32[4, 3] on cpu in which several elements share memory",
        "sparse": "sgl_comm::cfg_all_reduce: got a tensor without strides",
        "unknown group": "sgl_comm::cfg_all_reduce: unknown group 'nowhere'; call sgl_comm.init(group) first",
    }
    for texts in ranks.run(refusals):
        assert texts.keys() == words.keys()
        for what, text in texts.items():
            assert text.startswith(words[what].replace("on cpu", f"on {ranks.device}"))
