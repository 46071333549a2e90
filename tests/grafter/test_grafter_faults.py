"""Whatever goes wrong between two systems is told with both sides' words, and leaves the model's tensor as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sgl_comm
from helpers.grafting import Systems, config_of, free_port, grafted, systems
from sgl_comm.grafter import Grafter, GrafterConfig
from sgl_comm.testing import Dead, RankContext

SHORT_S = 1.0
"""How long an exchange may take here in which somebody does not come."""

HANDSHAKE_S = 2.0
"""How long a handshake may take; on a busy machine a twentieth more passes until it names who did not come."""

LATE_S = 0.5
"""How much later than that either may end on a busy machine."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Systems]:
    with systems((1, 1)) as running:
        yield running


def call(baseline: Any, target: Any, name: str = "x", **more: Any) -> dict[str, Any]:
    """One tensor of each side of one rank."""
    return {"values": {"baseline": [baseline], "target": [target]}, "tags": {"name": name, "layer": 3}, **more}


def ones_and_twos(name: str = "x", **more: Any) -> dict[str, Any]:
    return call(torch.ones(4), torch.full((4,), 2.0), name, **more)


def run_differing(
    ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: dict[str, list[dict[str, Any]]]
) -> Any:
    """Each side makes its own calls."""
    return grafted(ctx, fields, report_dir, calls[fields["role"]])


def of_both(pair: Systems, tmp_path: Path, calls: list[dict[str, Any]], **fields: Any) -> tuple[Any, Any]:
    (baseline,), (target,) = pair.run(grafted, str(tmp_path), calls, b2t_filter="True", **fields)
    return baseline, target


def assert_faulty(result: dict[str, Any], index: int, kept: Tensor, faults: int = 1) -> None:
    """The model's tensor is as it was, nothing was raised, the fault was counted, and the grafter goes on."""
    assert torch.equal(result["found"][index], kept)
    assert result["errors"] == []
    assert result["counts"]["faults"] == faults
    assert result["off"] == ""


def journal_of(tmp_path: Path, role: str) -> str:
    return (tmp_path / f"graft-{role}-0.jsonl").read_text()


def test_a_tensor_that_matches_both_filters_raises_before_anything_is_sent(tmp_path: Path) -> None:
    fields = config_of("target", (1, 1), free_port(), timeout=SHORT_S)
    config = GrafterConfig(**fields, b2t_filter="layer == 3", t2b_filter="name == 'x'", report_dir=str(tmp_path))
    with Grafter(config) as grafter:
        start = time.monotonic()
        with pytest.raises(sgl_comm.SglCommError, match="matched BOTH grafter_b2t_filter and grafter_t2b_filter"):
            grafter.dump("x", torch.ones(3), layer=3)
        assert time.monotonic() - start < SHORT_S * 0.9  # nobody was waited for
        assert grafter.counts == {}


@pytest.mark.gpu
def test_inside_a_graph_capture_a_tensor_that_matches_raises(tmp_path: Path) -> None:
    fields = config_of("target", (1, 1), free_port(), timeout=SHORT_S)
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with Grafter(GrafterConfig(**fields, b2t_filter="name == 'x'", report_dir=str(tmp_path))) as grafter:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = x + 1
            with pytest.raises(sgl_comm.SglCommError, match=r"'x' inside a CUDA graph capture; expected an eager call"):
                grafter.dump("x", y)
            grafter.dump("another", y)
        graph.replay()
        assert y.tolist() == [2.0] * 3


@pytest.mark.parametrize("missing_on", ["baseline", "target"])
def test_no_tensor_on_one_side(pair: Systems, tmp_path: Path, missing_on: str) -> None:
    bad = call(None, torch.full((4,), 2.0)) if missing_on == "baseline" else call(torch.ones(4), [1, 2])
    baseline, target = of_both(pair, tmp_path, [bad, ones_and_twos()])
    kind = {"baseline": "NoneType", "target": "list"}[missing_on]
    for role, result in (("baseline", baseline), ("target", target)):
        assert result["counts"]["faults"] == 1
        assert f"{missing_on} rank 0: got a {kind} as 'x'; expected a tensor" in journal_of(tmp_path, role)
    if missing_on == "baseline":
        assert_faulty(target, 0, torch.full((4,), 2.0))
    assert target["found"][1].tolist() == [1.0] * 4  # the next exchange is in step


def test_a_tensor_without_a_name(pair: Systems, tmp_path: Path) -> None:
    nameless = {**ones_and_twos(), "tags": {"layer": 3}}
    _, target = of_both(pair, tmp_path, [nameless, ones_and_twos()])
    assert_faulty(target, 0, torch.full((4,), 2.0))
    assert "expected a 'name' among them" in journal_of(tmp_path, "target")
    assert target["found"][1].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("what", "of_baseline", "of_target"),
    [
        ("name", {"name": "a", "layer": 3}, {"name": "b", "layer": 3}),
        ("tag", {"name": "a", "layer": 3}, {"name": "a", "layer": 4}),
        ("tag that one side has", {"name": "a", "layer": 3, "step": 1}, {"name": "a", "layer": 3}),
    ],
)
def test_out_of_step_both_headers_are_shown(
    pair: Systems, tmp_path: Path, what: str, of_baseline: dict[str, Any], of_target: dict[str, Any]
) -> None:
    calls = {
        role: [{**ones_and_twos(), "tags": tags}] for role, tags in (("baseline", of_baseline), ("target", of_target))
    }
    (baseline,), (target,) = pair.run(run_differing, str(tmp_path), calls, b2t_filter="True")
    assert_faulty(target, 0, torch.full((4,), 2.0))
    assert baseline["counts"] == {"faults": 1}
    for role in calls:
        text = journal_of(tmp_path, role)
        assert "out of step: baseline rank 0 has #0 b2t 'a' layer=3" in text
        assert f"target rank 0 has #0 b2t '{of_target['name']}' layer={of_target['layer']} float32[4]" in text


def test_a_side_that_has_one_tensor_more_is_seen(pair: Systems, tmp_path: Path) -> None:
    """Its next header shows another tensor; nobody gets a wrong one."""
    calls = {"baseline": [ones_and_twos("a"), ones_and_twos("b")], "target": [ones_and_twos("b"), ones_and_twos("b")]}
    (_,), (target,) = pair.run(run_differing, str(tmp_path), calls, b2t_filter="True")
    assert target["counts"] == {"faults": 1, "received": 1}
    assert target["found"][0].tolist() == [2.0] * 4


HALVES = torch.tensor([0.5, 1.5, -2.0, 300.0])


@pytest.mark.parametrize("policy", ["error", "cast", "skip"])
def test_another_dtype(pair: Systems, tmp_path: Path, policy: str) -> None:
    own = torch.zeros(4, dtype=torch.bfloat16)
    baseline, target = of_both(pair, tmp_path, [call(HALVES, own), ones_and_twos()], on_dtype=policy)
    text = "got dtype float32 from baseline rank 0 and bfloat16 on target rank 0"
    if policy == "cast":
        assert torch.equal(target["found"][0], HALVES.bfloat16())
        assert (baseline["counts"], target["counts"]) == ({"sent": 2}, {"received": 2})
        return
    assert text in journal_of(tmp_path, "target")
    assert text in journal_of(tmp_path, "baseline")
    assert torch.equal(target["found"][0], own)
    other = "skipped" if policy == "skip" else "faults"
    assert (baseline["counts"], target["counts"]) == ({other: 1, "sent": 1}, {other: 1, "received": 1})
    assert target["found"][1].tolist() == [1.0] * 4


@pytest.mark.parametrize("policy", ["error", "cast", "skip"])
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1,), (3,)])
def test_another_shape_is_never_broadcast(pair: Systems, tmp_path: Path, policy: str, shape: tuple[int, ...]) -> None:
    own = torch.zeros(4)
    sent = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    _, target = of_both(pair, tmp_path, [call(sent, own), ones_and_twos()], on_shape=policy)
    if policy == "cast" and sent.numel() == 4:
        assert torch.equal(target["found"][0], sent.view(4))
        return
    assert torch.equal(target["found"][0], own)
    assert f"got shape {list(shape)} from baseline rank 0 and [4] on target rank 0" in journal_of(tmp_path, "target")
    assert target["counts"] == {"skipped" if policy == "skip" else "faults": 1, "received": 1}


def test_full_tensors_that_differ_are_a_fault_under_layouts(pair: Systems, tmp_path: Path) -> None:
    bad = call(torch.ones(4, 2), torch.zeros(4, 3), layouts={"baseline": "Shard(0)", "target": "Shard(1)"})
    mixed = call(torch.ones(4), torch.zeros(4), layouts={"baseline": "Pad(0, 9)"})
    _, target = of_both(pair, tmp_path, [bad, mixed, ones_and_twos()], layout="Replicate")
    assert_faulty(target, 0, torch.zeros(4, 3), faults=2)
    text = journal_of(tmp_path, "target")
    assert (
        "got a full tensor of [4, 2] (Shard(0)) from the sending side and of [4, 3] (Shard(1)) on the receiving" in text
    )
    assert "expected at least 9 elements along dim 0" in text
    assert target["found"][2].tolist() == [1.0] * 4


def raises(pieces: Any, extras: Any, direction: str, rank: int, tags: Any) -> Tensor:
    raise ZeroDivisionError("of mine")


def of_wrong_shape(pieces: list[Tensor], extras: Any, direction: str, rank: int, tags: Any) -> Tensor:
    return pieces[0][:2]


def no_tensor(pieces: list[Tensor], extras: Any, direction: str, rank: int, tags: Any) -> Any:
    return pieces


def of_wrong_dtype(pieces: list[Tensor], extras: Any, direction: str, rank: int, tags: Any) -> Tensor:
    return pieces[0].double()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises, "the transform raised ZeroDivisionError: of mine"),
        (of_wrong_shape, "the transform returned shape [2]; expected [4]"),
        (no_tensor, "the transform returned a list; expected a tensor of [4]"),
        (of_wrong_dtype, "the transform returned torch.float64; expected torch.float32"),
    ],
)
def test_a_transform_that_fails(pair: Systems, tmp_path: Path, function: Any, words: str) -> None:
    path = f"test_grafter_faults.{function.__name__}"
    baseline, target = of_both(pair, tmp_path, [ones_and_twos()] * 2, transform_path=path)
    assert_faulty(target, 1, torch.full((4,), 2.0), faults=2)
    assert words in journal_of(tmp_path, "target")
    assert baseline["counts"] == {"sent": 2}  # it has done its part


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_a_tensor_that_overlaps_itself_cannot_be_written(tmp_path: Path, backend: str) -> None:
    with systems((1, 1)) as both:
        _, (target,) = both.run(run_overlapping, str(tmp_path), b2t_filter="True", backend=backend)
    assert target == ([[5.0, 6.0], [6.0, 7.0]], [5.0] * 4, {"faults": 2, "received": 1}, [1.0] * 4)
    assert "in which several elements share memory (expand); expected one to write into" in journal_of(
        tmp_path, "target"
    )


def run_overlapping(ctx: RankContext, fields: dict[str, Any], report_dir: str) -> Any:
    """Rows that share an element, and an expanded tensor; then a plain one."""
    own = fields["role"] == "target"
    rows = torch.tensor([5.0, 6.0, 7.0]).as_strided((2, 2), (1, 1)) if own else torch.arange(4.0).view(2, 2)
    expanded = torch.full((1,), 5.0).expand(4) if own else torch.arange(4.0)
    plain = torch.zeros(4) if own else torch.ones(4)
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        for name, tensor in (("rows", rows), ("expanded", expanded), ("plain", plain)):
            grafter.dump(name, tensor)
        return rows.tolist(), expanded.tolist(), grafter.counts, plain.tolist()


class Odd(torch.Tensor):
    """A tensor of another library's, with a dispatch of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("nobody may look inside")


class NoWords:
    """Something that cannot even be shown."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


ODD: dict[str, Any] = {
    "subclass": lambda: call(torch.ones(4), torch.Tensor._make_subclass(Odd, torch.full((4,), 2.0))),
    "meta": lambda: call(torch.ones(4), torch.ones(4, device="meta")),
    "nested": lambda: call(torch.ones(4), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "uninitialised": lambda: call(torch.ones(4), torch.nn.UninitializedParameter()),
    "sparse": lambda: call(torch.ones(4), torch.ones(4).to_sparse()),
    "emoji": lambda: {**ones_and_twos(), "tags": {"name": "x", "y": "\U0001f600" * 3000}},
    "no words": lambda: {**ones_and_twos(), "tags": {"name": "x", "y": NoWords()}},
    "large number": lambda: {**ones_and_twos(), "tags": {"name": "x", "y": 10**5000}},
    "tensor as extras": lambda: ones_and_twos(extras={"target": torch.ones(2)}),
    "odd extras": lambda: ones_and_twos(extras={"target": {"a": NoWords()}}),
    "layout": lambda: ones_and_twos(layouts={"target": "Shard(0)"}),
    "no layout": lambda: ones_and_twos(layouts={"target": 7}),
}


@pytest.mark.parametrize("what", list(ODD))
def test_what_cannot_be_exchanged_is_a_fault_of_both_and_the_next_is_in_step(
    pair: Systems, tmp_path: Path, what: str
) -> None:
    (baseline,), (target,) = pair.run(run_odd, str(tmp_path), what, b2t_filter="True")
    for counts, errors, off, last in (baseline, target):
        assert counts["faults"] == 1
        assert errors == []
        assert off == ""
        assert last == [1.0] * 4


def run_odd(ctx: RankContext, fields: dict[str, Any], report_dir: str, what: str) -> Any:
    odd, plain = ODD[what](), ones_and_twos()["values"][fields["role"]][0]
    errors = []
    with Grafter(GrafterConfig(**{**fields, "timeout": SHORT_S * 8}, report_dir=report_dir)) as grafter:
        try:
            role = fields["role"]
            extras, layout = (odd.get(name, {}).get(role) for name in ("extras", "layouts"))
            grafter.maybe_intercept(odd["values"][role][0], odd["tags"], extras, layout)
        except Exception as error:
            errors.append(str(error))
        grafter.dump("plain", plain)
        return grafter.counts, errors, grafter.off, plain.tolist()


@pytest.mark.parametrize("tags", [None, {"name": "x", "layer": torch.ones(2)}, {"name": "x", "layer": NoWords()}, 7])
def test_tags_that_cannot_be_compared_match_nothing(tmp_path: Path, tags: Any) -> None:
    fields = config_of("target", (1, 1), free_port(), timeout=SHORT_S)
    with Grafter(GrafterConfig(**fields, b2t_filter="layer == 3", report_dir=tmp_path / "report")) as grafter:
        grafter.maybe_intercept(torch.ones(3), tags)
        assert grafter.counts == {"unmatched": 1}


@pytest.mark.parametrize("who", ["sender", "one receiver"])
def test_a_transform_that_not_all_receivers_have_is_a_fault(tmp_path: Path, who: str) -> None:
    """Else a rank would get another rank's tensor."""
    with systems((2, 2)) as both:
        results = both.run(run_with_transform_on, str(tmp_path), who, b2t_filter="True")
    for side in results:
        for counts, value in side:
            assert counts == {"faults": 1}
            assert value in (0.0, 1.0, 100.0, 101.0)
    assert [value for _, value in results[1]] == [100.0, 101.0]


def run_with_transform_on(ctx: RankContext, fields: dict[str, Any], report_dir: str, who: str) -> Any:
    baseline = fields["role"] == "baseline"
    if baseline if who == "sender" else not baseline and ctx.rank == 0:
        fields = {**fields, "transform_path": "test_grafter_faults.of_wrong_dtype"}
    value = torch.full((3,), float(ctx.rank) + (0 if baseline else 100))
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        grafter.dump("x", value)
        return grafter.counts, value[0].item()


def test_after_a_failed_handshake_the_port_is_free_at_once(tmp_path: Path) -> None:
    fields = config_of("baseline", (1, 1), free_port(), timeout=1.0)
    for strict in (True, True, False):
        with Grafter(GrafterConfig(**fields, b2t_filter="True", report_dir=str(tmp_path), strict=strict)) as grafter:
            if strict:
                with pytest.raises(sgl_comm.SglCommError, match="target rank 0 did not come"):
                    grafter.dump("x", torch.ones(3))
            else:
                grafter.dump("x", torch.ones(3))
            assert "target rank 0 did not come" in grafter.off


def test_the_one_who_is_missing_is_named_on_every_rank(tmp_path: Path) -> None:
    with systems((1, 2)) as both:
        results = both.run(
            run_without_target_1, str(tmp_path), b2t_filter="True", layout="Replicate", timeout=HANDSHAKE_S * 1.5
        )
    (baseline,), (target, _) = results
    for seconds, off in (baseline, target):
        assert "target rank 1 did not come" in off
        assert HANDSHAKE_S < seconds < HANDSHAKE_S * 1.5 + LATE_S


def run_without_target_1(ctx: RankContext, fields: dict[str, Any], report_dir: str) -> Any:
    if fields["role"] == "target" and ctx.rank == 1:
        return None
    if fields["role"] == "baseline":
        time.sleep(HANDSHAKE_S / 4)  # the target's time is up before the baseline can tell it who is missing
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        start = time.monotonic()
        grafter.dump("x", torch.ones(3))
        return time.monotonic() - start, grafter.off


def test_a_forked_child_leaves_the_grafter_alone_and_ends(tmp_path: Path) -> None:
    with systems((1, 1)) as both:
        results = both.run(run_and_fork, str(tmp_path), b2t_filter="True")
    assert results == ([(True, [1.0] * 3)], [(True, [1.0] * 3)])


def run_and_fork(ctx: RankContext, fields: dict[str, Any], report_dir: str) -> Any:
    value = torch.full((3,), 1.0 if fields["role"] == "baseline" else 2.0)
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        grafter.dump("x", value)
        child = os.fork()
        if child == 0:
            grafter.dump("y", value)  # nothing
            grafter.close()
            os._exit(0 if not grafter.enabled else 1)
        ended = os.waitpid(child, 0)[1] == 0
        grafter.dump("z", value)
        return ended and grafter.counts.get("faults", 0) == 0, value.tolist()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("alone", ["baseline", "target"])
def test_a_peer_that_never_comes(tmp_path: Path, alone: str, strict: bool) -> None:
    fields = config_of(alone, (1, 1), free_port(), timeout=HANDSHAKE_S, strict=strict)
    config = GrafterConfig(**fields, b2t_filter="True", report_dir=str(tmp_path))
    x = torch.full((3,), 5.0)
    with Grafter(config) as grafter:
        start = time.monotonic()
        if strict:
            with pytest.raises(
                sgl_comm.SglCommError, match=f"^grafter: {alone} rank 0, #0 b2t .*did not come within 2 s"
            ):
                grafter.dump("x", x)
        else:
            grafter.dump("x", x)
        assert HANDSHAKE_S * 0.9 < time.monotonic() - start < HANDSHAKE_S + LATE_S
        start = time.monotonic()
        grafter.dump("x", x)  # switched off
        assert time.monotonic() - start < LATE_S
        assert grafter.counts == {"faults": 1, "skipped": 1}
        other = {"baseline": "target", "target": "baseline"}[alone]
        assert f"{other} rank 0 did not come within 2 s (timeout)" in grafter.off
    assert x.tolist() == [5.0] * 3


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize("absent", ["baseline", "target"])
def test_a_peer_that_does_not_come_to_an_exchange(pair: Systems, tmp_path: Path, absent: str, backend: str) -> None:
    results = pair.run(run_once_then_sleep, str(tmp_path), absent, b2t_filter="True", timeout=SHORT_S, backend=backend)
    (found, counts, seconds, off) = results[0 if absent == "target" else 1][0]
    assert found == ([1.0] * 4 if absent == "target" else [2.0] * 4)
    assert counts["faults"] == 1
    assert SHORT_S * 0.99 < seconds < SHORT_S + LATE_S
    assert f"the exchange with {absent} rank 0 failed within 1 s (timeout)" in off


def run_once_then_sleep(ctx: RankContext, fields: dict[str, Any], report_dir: str, absent: str) -> Any:
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        grafter.dump("x", torch.ones(4))
        if fields["role"] == absent:
            wait_for_end(report_dir)
            return None
        value = torch.full((4,), 1.0 if fields["role"] == "baseline" else 2.0)
        start = time.monotonic()
        grafter.dump("y", value)
        seconds = time.monotonic() - start
        tell_end(report_dir)
        return value.tolist(), grafter.counts, seconds, grafter.off


def tell_end(report_dir: str) -> None:
    """The exchange that is to fail is over, for whoever keeps out of it."""
    (Path(report_dir) / "over").touch()


def wait_for_end(report_dir: str) -> None:
    """Until then, or much longer than the exchange may take."""
    ends_at = time.monotonic() + 10 * SHORT_S
    while not (Path(report_dir) / "over").exists() and time.monotonic() < ends_at:
        time.sleep(0.01)


@pytest.mark.parametrize("who", ["baseline", "target"])
def test_a_large_tensor_where_one_side_has_no_descriptor_left(pair: Systems, tmp_path: Path, who: str) -> None:
    """Shared memory carries it in pieces if the sender cannot reserve memory; a receiver without access fails."""
    (baseline,), (target,) = pair.run(run_without_descriptors, str(tmp_path), who, b2t_filter="True", backend="shm")
    if who == "baseline":
        assert baseline == target == ([1.0, 1.0], "")
    else:
        values, off = target
        assert values == [2.0, 2.0]  # as they were
        assert "the memory in which rank 0 has its tensor cannot be reached" in off
        assert "Too many open files" in off
        assert "has closed its communicator" in baseline[1]


def run_without_descriptors(ctx: RankContext, fields: dict[str, Any], report_dir: str, who: str) -> Any:
    values = [torch.full((1 << 20,), 1.0 if fields["role"] == "baseline" else 2.0) for _ in range(2)]
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        grafter.dump("first", torch.ones(4))
        with no_more_descriptors() if fields["role"] == who else contextlib.nullcontext():
            grafter.dump("x", values[0])
        grafter.dump("y", values[1])
        return [float(value.unique()) for value in values], grafter.off


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process can open nothing."""
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_ends_in_the_middle_of_a_tensor(tmp_path: Path, backend: str, how: signal.Signals) -> None:
    """Nothing of its tensor is in the receiver's. Shared memory sees a death at once, gloo at the timeout at last."""
    with systems((1, 1)) as both:
        arguments = both.pools["baseline"].processes[0], str(tmp_path)
        wake = threading.Thread(target=wake_up, args=arguments, daemon=True)
        if how == signal.SIGSTOP:
            wake.start()
        (baseline,), (target,) = both.run(
            run_until_signal,
            str(tmp_path),
            int(how),
            b2t_filter="True",
            timeout=SHORT_S,
            backend=backend,
            allow_dead=True,
        )
    untouched, counts, seconds, off = target
    assert counts == {"received": 1, "faults": 1, "skipped": 1}
    assert untouched
    assert "the exchange with baseline rank 0 failed" in off
    assert isinstance(baseline, Dead) == (how == signal.SIGKILL)
    assert seconds < (SHORT_S * 0.9 if isinstance(baseline, Dead) and backend == "shm" else SHORT_S + LATE_S)


def wake_up(pid: int, report_dir: str) -> None:
    """Lets a process go on that has stopped, once its peer has given it up."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    wait_for_end(report_dir)
    os.kill(pid, signal.SIGCONT)


def run_until_signal(ctx: RankContext, fields: dict[str, Any], report_dir: str, how: int) -> Any:
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        baseline = fields["role"] == "baseline"
        grafter.dump("x", torch.ones(4))
        value = torch.full((128 << 20,), 1.0 if baseline else 2.0)
        if baseline:
            # The data alone takes a hundred milliseconds and more; headers take less than one.
            threading.Timer(0.03, lambda: os.kill(os.getpid(), how)).start()
        start = time.monotonic()
        grafter.dump("y", value)
        seconds = time.monotonic() - start
        if not baseline:
            tell_end(report_dir)
        grafter.dump("z", value)
        return bool((value == 2).all()), grafter.counts, seconds, grafter.off


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_a_sender_that_is_slow_ends_at_the_timeout(tmp_path: Path, backend: str) -> None:
    """It goes on for a moment now and then, so that no single wait is long."""
    with systems((1, 1)) as both:
        pid = both.pools["baseline"].processes[0]
        done = threading.Event()

        def slow_down() -> None:
            while not (tmp_path / "exchanged").exists() and not done.wait(0.01):
                pass
            threading.Timer(SHORT_S * 2, done.set).start()
            while not done.is_set():
                os.kill(pid, signal.SIGSTOP)
                done.wait(SHORT_S * 0.6)
                os.kill(pid, signal.SIGCONT)
                done.wait(0.004)

        threading.Thread(target=slow_down).start()
        try:
            _, (target,) = both.run(
                run_large, str(tmp_path), b2t_filter="True", timeout=SHORT_S, backend=backend, deadline=90
            )
        finally:
            done.set()
            os.kill(pid, signal.SIGCONT)
    longest, off, untouched = target
    assert longest < SHORT_S + LATE_S
    assert "the exchange with baseline rank 0 failed" in off
    assert untouched


def run_large(ctx: RankContext, fields: dict[str, Any], report_dir: str) -> Any:
    value = torch.full((96 << 20,), 1.0 if fields["role"] == "baseline" else 2.0)
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        grafter.dump("first", torch.ones(1))
        (Path(report_dir) / "exchanged").touch()
        longest, ends_at = 0.0, time.monotonic() + 5 * SHORT_S
        while not grafter.off and time.monotonic() < ends_at:
            if fields["role"] == "target":
                value.fill_(2.0)
            start = time.monotonic()
            grafter.dump("x", value)
            longest = max(longest, time.monotonic() - start)
        return longest, grafter.off, bool((value == 2).all())


def test_another_token(pair: Systems, tmp_path: Path) -> None:
    (baseline,), (target,) = pair.run(
        grafted, str(tmp_path), [ones_and_twos()] * 2, b2t_filter="True", baseline={"token": "a"}, target={"token": "b"}
    )
    for result, role, other in ((baseline, "baseline", "target"), (target, "target", "baseline")):
        assert result["counts"] == {"faults": 1, "skipped": 1}
        assert f"{other} rank 0 has another token than {role} rank 0" in result["off"]
        assert "SGLCOMM_GRAFTER_TOKEN" in journal_of(tmp_path, role)
    assert target["found"][0].tolist() == [2.0] * 4


def test_the_same_token(pair: Systems, tmp_path: Path) -> None:
    _, target = of_both(pair, tmp_path, [ones_and_twos()], token="of both")
    assert target["found"][0].tolist() == [1.0] * 4
    assert "of both" not in journal_of(tmp_path, "target")


def test_numbers_of_ranks_that_differ(pair: Systems, tmp_path: Path) -> None:
    (baseline,), (target,) = pair.run(
        grafted, str(tmp_path), [ones_and_twos()], b2t_filter="True", layout="Replicate", timeout=SHORT_S,
        target={"baseline_world_size": 1, "target_world_size": 2, "rank": 0},
    )  # fmt: skip
    assert "has worlds [1, 2] and baseline rank 0 [1, 1]" in baseline["off"]
    assert "has worlds [1, 2] and baseline rank 0 [1, 1]" in target["off"]


def test_two_processes_as_one_rank_are_refused(tmp_path: Path) -> None:
    with systems((1, 2)) as both:
        (baseline,), targets = both.run(
            run_as_rank_0,
            str(tmp_path),
            [{**ones_and_twos()}],
            b2t_filter="True",
            layout="Replicate",
            timeout=HANDSHAKE_S,
        )
    offs = [target["off"] for target in targets]
    assert "target rank 1 did not come within 2 s" in baseline["off"]
    assert any("another process has come as target rank 0; expected one (rank)" in off for off in offs)


def run_as_rank_0(ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]) -> Any:
    return grafted(dataclasses.replace(ctx, rank=0), {**fields, "rank": 0}, f"{report_dir}/{ctx.rank}", calls)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """By a server that never answers: the baseline cannot listen there, and the target gets no store out of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for role, words in (("baseline", "expected a master_port that is free"), ("target", "")):
            fields = config_of(role, (1, 1), port, timeout=SHORT_S)
            start, x = time.monotonic(), torch.full((3,), 5.0)
            with Grafter(GrafterConfig(**fields, b2t_filter="True", report_dir=str(tmp_path))) as grafter:
                grafter.dump("x", x)
                assert time.monotonic() - start < SHORT_S + LATE_S
                assert grafter.counts == {"faults": 1}
                assert words in grafter.off
                assert f"127.0.0.1:{port}" in grafter.off or "took longer than 1 s (timeout)" in grafter.off
            assert x.tolist() == [5.0] * 3


def test_strict_raises_what_would_be_counted(pair: Systems, tmp_path: Path) -> None:
    bad = call(torch.ones(3), torch.full((4,), 2.0))
    baseline, target = of_both(pair, tmp_path, [bad, ones_and_twos()], strict=True)
    for result in (baseline, target):
        (error,) = result["errors"]
        assert error.startswith("grafter: ")
        assert "got shape [3] from baseline rank 0 and [4] on target rank 0" in error
    assert target["found"][1].tolist() == [1.0] * 4


def test_a_report_that_cannot_be_written_stops_nothing(pair: Systems, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (_,), (target,) = pair.run(grafted, str(tmp_path / "file"), [ones_and_twos()], b2t_filter="True")
    assert target["found"][0].tolist() == [1.0] * 4
    assert target["counts"]["lines lost"] >= 1
