"""SGLCOMM_CHECK: ranks compare what they are about to call; a difference or a refusal is an error on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sgl_comm
from helpers.compare import assert_none_wrong
from helpers.errors import error_text
from helpers.ranks import group_without_shared_memory, ranks_on
from sgl_comm.testing import RankContext, RankPool

ops = sgl_comm.ops


@pytest.fixture(scope="module", params=[*ranks_on("cpu", (2, 3)), *ranks_on("cuda", (2, 3))])
def checking(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    env = {"SGLCOMM_CHECK": "1", "SGLCOMM_TIMEOUT": "20"}
    with RankPool(request.param.world, request.param.device, env=env) as pool:
        yield pool


CALLS: dict[str, Callable[[Tensor, str], object]] = {
    "all_reduce": lambda x, name: ops.cfg_all_reduce(x, name),
    "all_reduce_": lambda x, name: ops.cfg_all_reduce_(x, name),
    "broadcast": lambda x, name: ops.cfg_broadcast(x, 0, name),
    "broadcast_": lambda x, name: ops.cfg_broadcast_(x, 0, name),
}


def odd_calls(device: torch.device, name: str, call: str) -> dict[str, tuple[Callable[[], object], str]]:
    """What rank 1 does where the others call with float32[2, 3]: and words of its line in every rank's error."""
    own, x, on = CALLS[call], torch.ones(2, 3, device=device), f"on {device.type}"
    words = {"all_reduce": ("cfg_all_reduce of ", ", sum"), "broadcast": ("cfg_broadcast of ", " from rank 0")}
    begin, end = words[call.rstrip("_")]
    other = "broadcast" if call.startswith("all_reduce") else "all_reduce"
    odd: dict[str, tuple[Callable[[], object], str]] = {
        "shape": (lambda: own(x.view(3, 2), name), f"{begin}float32[3, 2] {on}{end}"),
        "dimensions": (lambda: own(x.view(6), name), f"{begin}float32[6] {on}{end}"),
        "dtype": (lambda: own(x.bfloat16(), name), f"{begin}bfloat16[2, 3] {on}{end}"),
        "op": (lambda: CALLS[other](x, name), f"cfg_{other} of float32[2, 3] {on}"),
        "grad": (lambda: own(x.clone().requires_grad_(), name), f"float32[2, 3] {on} that requires grad"),
        "sparse": (lambda: CALLS[call.rstrip("_")](x.to_sparse(), name), "got a tensor without strides"),
    }
    if device.type == "cuda":
        odd["device"] = (lambda: own(x.cpu(), name), f"{begin}float32[2, 3] on cpu{end}")
    if call.endswith("_"):
        odd["overlap"] = (lambda: own(x[:1].expand(2, 3), name), "in which several elements share memory")
    if call.startswith("broadcast"):
        odd["src"] = (lambda: ops.cfg_broadcast(x, 1, name), f"cfg_broadcast of float32[2, 3] {on} from rank 1")
        odd["no such src"] = (lambda: ops.cfg_broadcast(x, 9, name), "got src 9; expected a rank of the group, 0 to")
    else:
        odd["reduce_op"] = (lambda: ops.cfg_all_reduce(x, name, "max"), f"cfg_all_reduce of float32[2, 3] {on}, max")
        odd["no such reduce_op"] = (lambda: ops.cfg_all_reduce(x, name, "mean"), "got reduce_op 'mean'")
    return odd


def errors_of(ctx: RankContext, name: str) -> list[str]:
    """What is wrong with the errors that every rank gets, and with the calls that follow."""
    wrong = []
    for call, own in CALLS.items():
        for what, (odd, words) in odd_calls(ctx.device, name, call).items():
            x = torch.ones(2, 3, device=ctx.device)
            text = error_text(odd if ctx.rank == 1 else lambda own=own, x=x: own(x, name))
            begin = "sgl_comm::cfg_"
            reason = ": expected the same call on every rank, and none that is refused; got rank 0: cfg_"
            if not (text.startswith(begin) and reason in text and text.endswith("Nothing was sent (SGLCOMM_CHECK)")):
                wrong.append(f"{call}, {what}: {text!r}")
            elif words not in text.partition("; rank 1: ")[2].partition("; rank 2: ")[0]:
                wrong.append(f"{call}, {what}: not {words!r} in {text!r}")
            if x.unique().tolist() != [1]:
                wrong.append(f"{call}, {what}: the tensor was written")
            wrong += works(ctx, name, f"{call}, {what}")
    return wrong


def works(ctx: RankContext, name: str, label: str) -> list[str]:
    """Whether calls work, of layouts that differ and in place on one rank alone: neither is a difference."""
    x = torch.ones(6, device=ctx.device).view(3, 2)
    x = x.t() if ctx.rank == 0 else x.view(2, 3)
    total = ops.cfg_all_reduce(x, name)
    sent = ops.cfg_broadcast(x * ctx.rank, ctx.world - 1, name)
    y = torch.full((4,), float(ctx.rank), device=ctx.device)
    if ctx.rank == 0:
        ops.cfg_broadcast_(y, 1, name)
    else:
        y = ops.cfg_broadcast(y, 1, name)
    found = [each.unique().tolist() for each in (total, sent, y)]
    return [] if found == [[ctx.world], [ctx.world - 1], [1]] else [f"{label}, the calls afterwards: got {found}"]


def with_shared_memory(ctx: RankContext) -> list[str]:
    return errors_of(ctx, ctx.group.group_name)


def by_the_own_backend(ctx: RankContext) -> list[str]:
    with group_without_shared_memory(ctx) as name:
        return errors_of(ctx, name)


def refused_by_all(ctx: RankContext) -> str:
    name = ctx.group.group_name
    text = error_text(lambda: ops.cfg_all_reduce_(torch.ones(1, 3, device=ctx.device).expand(2, 3), name))
    assert not works(ctx, name, "")
    return text


def differing_settings(ctx: RankContext) -> list[str]:
    """Of init, where rank 1 alone has another value or a bad one, and where nothing can compare; then a group works."""
    group, texts = dist.new_group(list(range(ctx.world))), []
    for value in ("1", "yes"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SGLCOMM_CHECK", value if ctx.rank == 1 else "0")
            texts.append(error_text(lambda: sgl_comm.init(group)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgl_comm.backends.shm_all_reduce.why_not_world_size", lambda world: "the test wants it so")
        patch.setattr("sgl_comm.backends.rendezvous.Rendezvous.backend_for", lambda link, device_type: "none")
        texts.append(error_text(lambda: sgl_comm.init(group)))
    with sgl_comm.init(group) as comm:
        assert comm.cfg_all_reduce(torch.ones(3)).tolist() == [ctx.world] * 3
    dist.destroy_process_group(group)
    return texts


def unchecked(ctx: RankContext) -> list[float]:
    """Shapes that differ where nothing is compared: as many elements are summed, one after the other."""
    shape = (3, 2) if ctx.rank == 1 else (2, 3)
    return ops.cfg_all_reduce(torch.arange(6.0).view(shape), ctx.group.group_name).flatten().tolist()


def test_a_difference_or_a_refusal_is_told_on_every_rank_and_calls_go_on(checking: RankPool) -> None:
    assert_none_wrong(checking.run(with_shared_memory, deadline=60))


def test_the_same_by_the_own_backend(checking: RankPool) -> None:
    assert_none_wrong(checking.run(by_the_own_backend, deadline=60))


def test_what_every_rank_refuses_is_told_as_theirs(checking: RankPool) -> None:
    for text in checking.run(refused_by_all, deadline=60):
        refusal = r"refused, sgl_comm::cfg_all_reduce_: got float32\[2, 3\] on (cpu|cuda) in which several"
        assert len(re.findall(refusal, text)) == len(text.split("; rank "))


def test_the_setting_must_be_alike_and_known(checking: RankPool) -> None:
    for rank, (differs, bad, without) in enumerate(checking.run(differing_settings, deadline=60)):
        assert differs.startswith("init: got SGLCOMM_CHECK of 0, 1")
        problem = "got SGLCOMM_CHECK='yes'; expected 0 or 1"
        assert without.startswith("init: got SGLCOMM_CHECK=1 and a group that cannot pass CPU tensors")
        assert bad == (f"init: {problem}" if rank == 1 else f"init: rank 1: {problem}")


def test_nothing_is_compared_without_it() -> None:
    with RankPool(2) as pool:
        assert pool.run(unchecked, deadline=30) == [[0, 2, 4, 6, 8, 10]] * 2
