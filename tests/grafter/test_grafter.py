"""Tensors between two running systems: the bits that arrive, for every way in which the sides may hold them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.grafting import Systems, config_of, free_port, grafted, systems
from helpers.programs import environment
from helpers.values import random_bytes
from sgl_comm import envs, testing
from sgl_comm.grafter import Grafter, GrafterConfig
from sgl_comm.testing import RankContext

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64]
BOTH_WAYS = {"b2t_filter": "search('^b2t', name)", "t2b_filter": "search('^t2b', name)"}
OTHER = {"baseline": "target", "target": "baseline"}
SENDER = {"b2t": "baseline", "t2b": "target"}


def of_device(device: str, worlds: list[tuple[int, int]]) -> list[Any]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param((device, pair), id=f"{device}-{pair[0]}+{pair[1]}", marks=marks) for pair in worlds]


WORLDS = [(1, 1), (2, 2), (4, 2), (2, 3)]


EQUAL = [(1, 1), (2, 2)]


def _running(request: pytest.FixtureRequest) -> Iterator[Systems]:
    device, worlds = request.param
    with systems(worlds, device) as running:
        yield running


both = pytest.fixture(scope="module", params=[*of_device("cpu", WORLDS), *of_device("cuda", WORLDS)])(_running)
pairs = pytest.fixture(scope="module", params=[*of_device("cpu", EQUAL), *of_device("cuda", EQUAL)])(_running)
"""Sides of one size, whose rank i talks to rank i."""


def full_tensors(shape: tuple[int, ...], dtype: torch.dtype, *seed: object) -> dict[str, Tensor]:
    """The two sides' own tensors, of any bits."""
    baseline, target = random_bytes(2, shape, dtype, *seed)
    return {"baseline": baseline, "target": target}


def assert_received(results: Any, calls: list[dict[str, Any]], expected: list[dict[str, list[Tensor]]]) -> None:
    """Every rank of both sides has these bits after each call, and no errors."""
    for role, ranks in zip(("baseline", "target"), results, strict=True):
        for rank, result in enumerate(ranks):
            assert result["errors"] == []
            assert result["off"] == ""
            assert "faults" not in result["counts"]
            for call, found, wanted in zip(calls, result["found"], expected, strict=True):
                label = f"{call['tags']['name']} on {role} rank {rank}"
                testing.assert_bits_equal(as_bytes(found), as_bytes(wanted[role][rank]), label)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_rank_i_gets_the_bits_of_rank_i(pairs: Systems, backend: str, tmp_path: Path) -> None:
    world = pairs.worlds[0]
    calls, expected = [], []
    for direction in ("b2t", "t2b"):
        for dtype in [*DTYPES, torch.bool, torch.float8_e4m3fn, torch.complex64]:
            for shape in ((5, 7), (0, 3), (), (3, 1000, 50)):
                name = f"{direction} {dtype} {shape}"
                values = {role: random_bytes(world, shape, dtype, name, role) for role in OTHER}
                calls.append({"values": values, "tags": {"name": name}})
                expected.append(dict.fromkeys(OTHER, values[SENDER[direction]]))
    results = pairs.run(grafted, str(tmp_path), calls, backend=backend, **BOTH_WAYS)
    assert_received(results, calls, expected)
    half = len(calls) // 2
    for side in results:
        for result in side:
            assert result["counts"] == {"sent": half, "received": half}


def run_strided(ctx: RankContext, fields: dict[str, Any], report_dir: str, names: list[str]) -> list[str]:
    """Every layout in memory that a tensor can have, on each side another; what is wrong with what came."""
    wrong = []
    shape = (4, 6, 3)
    layouts = [layout for layout in testing.layouts(shape).values() if not layout.overlaps]
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        for number, name in enumerate(names):
            values = full_tensors(shape, torch.float32, name)
            role = fields["role"]
            layout = layouts[(number + (role == "target")) % len(layouts)]
            placed = layout(values[role].to(ctx.device))
            grafter.dump(name, placed.tensor)
            if placed.overwritten():
                wrong.append(f"{name}: bytes around the tensor were overwritten")
            if not torch.equal(as_bytes(placed.tensor.cpu()), as_bytes(values["baseline"])):
                wrong.append(f"{name}: other bits, {layout.name}")
    return wrong


def test_a_tensor_may_have_any_strides_on_either_side(pairs: Systems, tmp_path: Path) -> None:
    count = len([layout for layout in testing.layouts((4, 6, 3)).values() if not layout.overlaps])
    names = [f"b2t {number}" for number in range(count)]
    results = pairs.run(run_strided, str(tmp_path), names, **BOTH_WAYS)
    assert results == ([[]] * pairs.worlds[0], [[]] * pairs.worlds[1])


def run_large(ctx: RankContext, fields: dict[str, Any], report_dir: str) -> tuple[list[str], dict[str, int], str]:
    """Tensors that grow and shrink again, of which shared memory carries all but the last in one piece."""
    wrong = []
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        for number, (num_bytes, dtype) in enumerate(LARGE):
            values = full_tensors((num_bytes // dtype.itemsize,), dtype, "large", number)
            own = values[fields["role"]].to(ctx.device)
            grafter.dump(f"b2t {number}", own)
            if not torch.equal(as_bytes(own.cpu()), as_bytes(values["baseline"])):
                wrong.append(f"{number}: other bits")
        return wrong, grafter.counts, grafter.off


LARGE = [
    (2 << 20, torch.float32), (5_000_004, torch.bfloat16), (3 << 20, torch.complex64), (9_000_000, torch.float64),
    ((2 << 20) - 1, torch.int8),
]  # fmt: skip
"""Bytes and dtypes: such as are compared in one pass, and such as are not."""


def test_large_tensors(both: Systems, tmp_path: Path) -> None:
    """Gloo, which takes seconds, between two ranks alone."""
    layout = "Replicate" if both.worlds[0] != both.worlds[1] else None
    for backend in ("shm", "gloo") if both.worlds == (1, 1) else ("shm",):
        results = both.run(run_large, str(tmp_path / backend), b2t_filter="True", backend=backend, layout=layout)
        for outcome, side in zip(("sent", "received"), results, strict=True):
            assert [result for result in side if result != ([], {outcome: len(LARGE)}, "")] == []


def pieces_in(layout: str, full: Tensor, world: int) -> list[Tensor]:
    """What each rank holds of a tensor in a layout; shards are as unequal as they can be."""
    if layout == "Replicate":
        return [full.clone() for _ in range(world)]
    if layout.startswith("Shard"):
        return [x.contiguous() for x in torch.tensor_split(full, world, int(layout[6:-1]))]
    dim, _, of = layout.removeprefix("Pad(").partition(", ")
    inner = of.partition(", ")[2][:-1] or "Replicate"
    padding = list(full.shape)
    padding[int(dim)] = 3
    filler = torch.full(padding, 7).to(full.dtype)
    return pieces_in(inner, torch.cat([full, filler], int(dim)), world)


SHAPE = (6, 11, 2)
LAYOUTS = [
    ("Replicate", "Replicate"), ("Replicate", "Shard(0)"), ("Shard(0)", "Replicate"), ("Shard(0)", "Shard(1)"),
    ("Shard(1)", "Shard(0)"), ("Shard(-2)", "Replicate"), ("Pad(0, 6)", "Replicate"), ("Replicate", "Pad(1, 11)"),
    ("Pad(0, 6, Shard(0))", "Shard(1)"), ("Shard(1)", "Pad(1, 11, Shard(1))"),
    ("Pad(1, 11, Shard(1))", "Pad(0, 6, Shard(0))"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_every_layout_becomes_every_other(both: Systems, backend: str, tmp_path: Path) -> None:
    calls, expected = [], []
    for direction in ("b2t", "t2b"):
        for number, (baseline, target) in enumerate(LAYOUTS):
            dtype = DTYPES[number % len(DTYPES)]
            layouts = {"baseline": baseline, "target": target}
            name = f"{direction} {baseline} {target} {dtype}"
            wholes = full_tensors(SHAPE, dtype, name)
            values, wanted = {}, {}
            for role, world in zip(OTHER, both.worlds, strict=True):
                values[role] = pieces_in(layouts[role], wholes[role], world)
                # What is padding on the receiver is left as it was; the fillers are alike.
                wanted[role] = pieces_in(layouts[role], wholes[SENDER[direction]], world)
            calls.append({"values": values, "tags": {"name": name, "layer": number}, "layouts": layouts})
            expected.append(wanted)
    results = both.run(grafted, str(tmp_path), calls, backend=backend, layout="Replicate", **BOTH_WAYS)
    assert_received(results, calls, expected)


def reversed_pieces(pieces: list[Tensor], extras: list[dict], direction: str, rank: int, tags: dict) -> Tensor:
    """A transform that uses all that it is given."""
    assert [extra["rank"] for extra in extras] == list(range(len(pieces)))
    assert tags == {"name": f"{direction} x", "layer": 3}
    return torch.cat(pieces[::-1]).roll(rank, 0)


def test_a_transform_gets_the_pieces_in_rank_order(both: Systems, tmp_path: Path) -> None:
    calls, expected = [], []
    for direction in ("b2t", "t2b"):
        values = {}
        for role, world in zip(OTHER, both.worlds, strict=True):
            rows = 24 // world
            values[role] = random_bytes(world, (rows if role == SENDER[direction] else 24, 2), torch.float32, role)
        sent = values[SENDER[direction]]
        receivers = dict(zip(OTHER, both.worlds, strict=True))[OTHER[SENDER[direction]]]
        wanted = {
            SENDER[direction]: sent,
            OTHER[SENDER[direction]]: [torch.cat(sent[::-1]).roll(rank, 0) for rank in range(receivers)],
        }
        extras = {SENDER[direction]: None}
        calls.append({"values": values, "tags": {"name": f"{direction} x", "layer": 3}, "extras": extras})
        expected.append(wanted)
    results = both.run(
        grafted_with_ranks, str(tmp_path), calls, transform_path="test_grafter.reversed_pieces", **BOTH_WAYS
    )
    assert_received(results, calls, expected)


def grafted_with_ranks(ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]) -> Any:
    calls = [{**call, "extras": {fields["role"]: {"rank": ctx.rank}}} for call in calls]
    return grafted(ctx, fields, report_dir, calls)


def test_names_that_match_nothing_cost_no_communication(both: Systems, tmp_path: Path) -> None:
    """Each side dumps others of them, in between."""
    calls = []
    values = {
        role: [torch.full((2,), float(rank)) for rank in range(world)]
        for role, world in zip(OTHER, both.worlds, strict=True)
    }
    calls = [{"values": values, "tags": {"name": "b2t y"}}]
    layout = {} if both.worlds[0] == both.worlds[1] else {"layout": "Replicate"}
    results = both.run(with_unmatched, str(tmp_path), calls, **BOTH_WAYS, **layout)
    for role, side in zip(OTHER, results, strict=True):
        for result in side:
            assert result["errors"] == []
            assert result["counts"]["unmatched"] == {"baseline": 3, "target": 0}[role]
            assert result["counts"]["sent" if role == "baseline" else "received"] == 1


def with_unmatched(ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]) -> Any:
    extra = [{**calls[0], "tags": {"name": f"nothing {number}"}} for number in range(3)]
    result = grafted(ctx, fields, report_dir, [*extra, *calls] if fields["role"] == "baseline" else calls)
    result["counts"].setdefault("unmatched", 0)
    return result


SCRIPT = """
import sys, torch, torch.distributed as dist
from sgl_comm.grafter import Grafter
with Grafter() as grafter:
    x = torch.full((3,), float(sys.argv[1]), dtype=torch.float16)
    grafter.dump("x", x)
    print(x.tolist(), grafter.counts, dist.is_initialized())
"""


def test_no_default_group_is_needed(tmp_path: Path) -> None:
    """Two processes that have nothing of torch.distributed's, configured by the environment alone."""
    fields = config_of("", (1, 1), free_port(), b2t_filter="name == 'x'", report_dir=str(tmp_path), timeout=60)
    environ = environment()
    environ |= {envs.GRAFTER[name].name: str(int(value) if value is True else value) for name, value in fields.items()}
    sides = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, number], env={**environ, envs.GRAFTER["role"].name: role},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for role, number in (("baseline", "1"), ("target", "2"))
    ]  # fmt: skip
    try:
        printed = [side.communicate(timeout=90) for side in sides]
    finally:
        for side in sides:
            side.kill()
    assert [side.returncode for side in sides] == [0, 0], printed
    assert [out for out, _ in printed] == [
        "[1.0, 1.0, 1.0] {'sent': 1} False\n",
        "[1.0, 1.0, 1.0] {'received': 1} False\n",
    ]
