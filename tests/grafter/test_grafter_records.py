"""The offline twin: what one run has recorded stands for it in another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.values import random_bytes
from sgl_comm import SglCommError, testing
from sgl_comm.grafter import Grafter, GrafterConfig

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def side(tmp_path: Path, role: str, rank: int = 0, worlds: tuple[int, int] = (1, 1), **fields: Any) -> Grafter:
    """A recording baseline or an observing target."""
    baseline, target = worlds
    return Grafter(
        GrafterConfig(
            enable=True, role=role, rank=rank, mode="record" if role == "baseline" else "observe", b2t_filter="True",
            baseline_world_size=baseline, target_world_size=target, record_dir=str(tmp_path / "records"),
            report_dir=str(tmp_path / "report"), **fields,
        )
    )  # fmt: skip


def lines(tmp_path: Path, kind: str, role: str = "target", rank: int = 0) -> list[dict[str, Any]]:
    text = (tmp_path / "report" / f"graft-{role}-{rank}.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]


def test_what_was_recorded_is_what_is_observed(tmp_path: Path) -> None:
    shapes = [(3, 4), (), (0, 2)]
    sent = {(dtype, shape): random_bytes(1, shape, dtype, "records")[0] for dtype in DTYPES for shape in shapes}
    with side(tmp_path, "baseline") as grafter:
        for (dtype, shape), value in sent.items():
            grafter.dump(f"{dtype} {shape}", value, step=1)
        assert grafter.counts == {"recorded": len(sent)}
    with side(tmp_path, "target") as grafter:
        for (dtype, shape), value in reversed(sent.items()):  # in another order
            own = value.clone()
            grafter.dump(f"{dtype} {shape}", own, step=1)
            testing.assert_bits_equal(own.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
        assert grafter.counts == {"observed": len(sent)}
    assert [line["differing"] for line in lines(tmp_path, "exchange")] == [0] * len(sent)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3).t()
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", x, layer=3)
    (path,) = (tmp_path / "records").iterdir()
    assert path.name == "baseline-0-000000.safetensors"
    assert torch.equal(safetensors_torch.load_file(path)["value"], x)


def test_a_difference_is_seen_and_the_tensor_left_alone(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", torch.tensor([3.0, 4.0]))
    own = torch.tensor([3.0, 4.5])
    with side(tmp_path, "target") as grafter:
        grafter.dump("x", own)
    assert own.tolist() == [3.0, 4.5]
    (line,) = lines(tmp_path, "exchange")
    assert line["outcome"] == "observed"
    assert line["rel_l2"] == pytest.approx(0.1)
    assert line["max_abs"] == 0.5
    assert line["differing"] == 1


def test_the_second_of_a_name_is_the_second_record(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        for number in range(3):
            grafter.dump("x", torch.full((2,), float(number)))
    with side(tmp_path, "target") as grafter:
        for number in range(4):
            grafter.dump("x", torch.full((2,), float(number)))
        assert grafter.counts == {"observed": 3, "faults": 1}
    assert [line["differing"] for line in lines(tmp_path, "exchange")] == [0, 0, 0]
    (fault,) = lines(tmp_path, "fault")
    assert "baseline rank 0 has 3 records of" in fault["fault"]
    assert "expected number 4" in fault["fault"]


def test_pieces_of_several_ranks_are_joined(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    for rank in range(2):
        with side(tmp_path, "baseline", rank, (2, 1), layout="Shard(1)") as grafter:
            grafter.dump("x", whole.chunk(2, 1)[rank])
    with side(tmp_path, "target", 0, (2, 1), layout="Replicate") as grafter:
        grafter.dump("x", whole)
    with side(tmp_path, "target", 1, (2, 3), layout="Shard(0)") as grafter:
        grafter.dump("x", whole[:0])
        assert grafter.counts == {"faults": 1}
    (line,) = lines(tmp_path, "exchange")
    assert (line["numel"], line["differing"]) == (24, 0)


def test_another_shape_is_a_fault(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", torch.ones(3))
    with side(tmp_path, "target") as grafter:
        grafter.dump("x", torch.ones(4))
        assert grafter.counts == {"faults": 1}
    assert "got shape [3] from baseline rank 0 and [4] on target rank 0" in lines(tmp_path, "fault")[0]["fault"]


def test_what_goes_the_other_way_is_skipped(tmp_path: Path) -> None:
    with side(tmp_path, "baseline", t2b_filter="name == 'y'") as grafter, pytest.raises(SglCommError, match="BOTH"):
        grafter.dump("y", torch.ones(3))
    fields = {"role": "baseline", "mode": "record", "b2t_filter": "name == 'x'", "t2b_filter": "name == 'y'"}
    config = GrafterConfig(
        enable=True, baseline_world_size=1, record_dir=str(tmp_path), report_dir=str(tmp_path / "report"), **fields
    )
    with Grafter(config) as grafter:
        grafter.dump("y", torch.ones(3))
        assert grafter.counts == {"skipped": 1}


def test_records_are_not_mixed_with_those_of_another_run(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", torch.ones(3))
    with pytest.raises(SglCommError, match="which has records of baseline rank 0; expected none"):
        side(tmp_path, "baseline")


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SglCommError, match="without records of the baseline"):
        side(tmp_path, "target")
    folder = tmp_path / "records"
    folder.mkdir(exist_ok=True)
    path = folder / "baseline-0-000000.safetensors"
    for content in (b"", b"\x80\x04garbage", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(SglCommError, match="which is no record"):
            side(tmp_path, "target")
    safetensors_torch.save_file({"value": torch.ones(3)}, path)  # without a header
    with pytest.raises(SglCommError, match="which is no record"):
        side(tmp_path, "target")


def test_a_record_whose_header_tells_of_another_tensor_is_a_fault(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", torch.ones(4))
    (path,) = (tmp_path / "records").iterdir()
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    for other in (torch.ones(4, dtype=torch.int32), torch.ones(2, 2), torch.ones(3)):
        safetensors_torch.save_file({"value": other}, path, metadata)
        with side(tmp_path, "target") as grafter:
            grafter.dump("x", torch.ones(4))
            assert grafter.counts == {"faults": 1}
            assert grafter.off == ""


def test_a_tensor_that_cannot_be_recorded_is_a_fault(tmp_path: Path) -> None:
    with side(tmp_path, "baseline") as grafter:
        grafter.dump("x", [1, 2])  # type: ignore[arg-type]
        grafter.dump("x", torch.ones(3))
        assert grafter.counts == {"faults": 1, "recorded": 1}


def module() -> torch.nn.Module:
    class Pair(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x + 1, {"double": x * 2}

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Identity()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            first, more = self.pair(self.mlp(x))
            return first + more["double"]

    return torch.nn.Sequential(Layer(), Layer())


def test_hooks_intercept_what_modules_return(tmp_path: Path) -> None:
    model, x = module(), torch.ones(2)
    with side(tmp_path, "baseline") as grafter:
        with grafter.hook_modules(model, ["*.pair", "1.mlp", "1"], part="test"):
            model(x)
            model(x)
        model(x)  # no longer hooked
    found = [
        (line["name"], line["tags"]["layer"], line["tags"]["step"]) for line in lines(tmp_path, "exchange", "baseline")
    ]
    once = [("0.pair.0", 0), ("0.pair.1.double", 0), ("1.mlp", 1), ("1.pair.0", 1), ("1.pair.1.double", 1), ("1", 1)]
    assert found == [(name, layer, step) for step in range(2) for name, layer in once]
    assert all(line["tags"]["part"] == "test" for line in lines(tmp_path, "exchange", "baseline"))


def test_a_compiled_model_may_dump(tmp_path: Path) -> None:
    """The graph breaks there; what a disabled grafter is given costs no break."""
    with side(tmp_path, "baseline") as grafter:

        def model(x: Tensor) -> Tensor:
            y = x * 2
            grafter.dump("y", y)
            return y + 1

        assert torch.compile(model, backend="eager")(torch.ones(3)).tolist() == [3.0] * 3
        assert grafter.counts == {"recorded": 1}
        grafter.close()
        assert torch.compile(model, backend="eager", fullgraph=True)(torch.ones(4)).tolist() == [3.0] * 4
