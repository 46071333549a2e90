"""``python -m sgl_comm bench``: its table, its JSON, its exit status, and what it counts as wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.programs import run_python
from sgl_comm.__main__ import main
from sgl_comm.testing import RankContext, run_ranks
from sgl_comm.tools import bench, report, timing
from sgl_comm.tools.contenders import Contender, ProcessGroup
from sgl_comm.tools.report import Figures, Row

COLUMNS = ["size", "count", "type", "redop", "time", "p99", "algbw", "busbw", "#wrong", "time", "ratio"]


def run_cli(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return run_python(*launcher, "-m", "sgl_comm", "bench", *args)


def table_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line and not line.startswith("#")]


def test_the_table_and_the_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_cli("--device", "cpu", "--min-bytes", "1K", "--max-bytes", "8K", "--iters", "5", "--json", str(file))
    assert done.returncode == 0, done.stderr
    headings = [line.lstrip("#").split() for line in done.stdout.splitlines() if line.startswith("#")]
    assert [heading[:9] for heading in headings if heading[:1] == ["size"]] == [COLUMNS[:9]]
    rows = table_of(done.stdout)
    assert [row[:4] for row in rows] == [["1024", "512", "bfloat16", "sum"], ["4096", "2048", "bfloat16", "sum"]]
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert all(row[8] == "0" for row in rows)
    assert done.stdout.splitlines()[-1] == "# wrong elements: 0 OK"
    assert "\r" not in done.stderr

    figures = json.loads(file.read_text())
    environment = figures["environment"]
    assert (environment["world"], environment["device"], environment["dtype"]) == (2, "cpu", "bfloat16")
    assert environment["form"] == "in place"
    assert environment["torch"] == torch.__version__
    for row, shown in zip(figures["rows"], rows, strict=True):
        assert [str(row["size"]), str(row["count"]), row["type"], row["redop"]] == shown[:4]
        assert [row["ours"]["name"], *(other["name"] for other in row["others"])] == ["sgl_comm", "gloo"]
        for one in (row["ours"], *row["others"]):
            assert 0 < one["median_us"] <= one["p99_us"]
            assert one["samples"] == 5
            assert one["wrong"] == 0
            assert one["busbw"] == pytest.approx(row["size"] / one["median_us"] / 1e3, rel=0.02)
        assert row["ratios"]["gloo"] == pytest.approx(
            row["others"][0]["median_us"] / row["ours"]["median_us"], rel=0.02
        )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out_of_place_on_three_ranks(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    options = ["--world", "3", "--dtype", dtype, "--out-of-place", "--sizes", "6", "3000", "--iters", "3"]
    assert main(["bench", "--device", "cpu", *options]) == 0
    output = capsys.readouterr().out
    itemsize = bench.DTYPES[dtype].itemsize
    sizes = [6 // itemsize * itemsize, 3000]
    assert [row[:3] for row in table_of(output)] == [[str(s), str(s // itemsize), dtype] for s in sizes]
    assert "sgl_comm, out of place" in output


def test_under_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_cli("--device", "cpu", "--sizes", "1K", "--iters", "3", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len(table_of(done.stdout)) == 1, "one rank prints"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "0"],
        ["--sizes", "1.5M"],
        ["--factor", "1"],
        ["--min-bytes", "2K", "--max-bytes", "1K"],
        ["--world", "0"],
        ["--algos", "one_shot"],
        ["--device", "cuda", "--algos", "no_shot"],
        ["--json", "no/such/folder/file.json"],
        ["--out-of-place", "--in-place"],
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (3, 1)])
def test_a_wrong_element_fails_the_run(
    wrong: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = Figures.make("sgl_comm", timing.Timing(2.0, 3.0, 50, 10), 1024, 2, wrong)
    row = Row(1024, 512, "bfloat16", "sum", figures, ())

    @contextlib.contextmanager
    def ranks(_: object) -> Iterator[bench.Ranks]:
        yield bench.Ranks(2, "cpu", True, "not bound", lambda fn, *args: row if args else "shm")

    monkeypatch.setattr(bench, "_own_ranks", ranks)
    assert main(["bench", "--sizes", "1K"]) == status
    assert f"# wrong elements: {wrong}" in capsys.readouterr().out


class OffByOneBit(Contender):
    """Right but for the last bit of two elements on rank 1."""

    exact = True

    def __init__(self, ctx: RankContext) -> None:
        super().__init__()
        self.name, self.ctx = "off", ctx

    def run(self) -> torch.Tensor:
        assert self.ctx.comm is not None
        y = self.ctx.comm.all_reduce(next(self.turns))
        if self.ctx.rank == 1:
            y.view(torch.int16)[3:5] ^= 1
        return y


def count_wrong(ctx: RankContext) -> list[int | None]:
    untouched = Contender()
    untouched.run = lambda: next(untouched.turns)  # type: ignore[method-assign]
    everyone = [OffByOneBit(ctx), ProcessGroup("gloo", ctx.group, False), untouched]
    return [bench._count_wrong(ctx, each, 64, torch.bfloat16, seed=1) for each in everyone]


def test_wrong_elements_are_counted_over_all_ranks() -> None:
    for off, right, untouched in run_ranks(count_wrong, 2):
        assert off == 2
        assert right == 0
        assert untouched is not None
        assert untouched > 64


def stays_finite(ctx: RankContext, dtype: torch.dtype) -> bool:
    assert ctx.comm is not None
    x = timing.timed_values(1000, dtype, ctx.device)
    for _ in range(timing.calls_until_overflow(dtype, ctx.world)):
        ctx.comm.all_reduce_(x)
    return bool(x.isfinite().all()) and bool((x != 0).any())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_timed_values_stay_finite(world: int, dtype: torch.dtype) -> None:
    assert all(run_ranks(stays_finite, world, dtype))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (0.2, "0.200"), (9.876, "9.88"), (9.999, "10.0"), (98765, "98800")],
)
def test_rounded(value: float, text: str) -> None:
    assert report.rounded(value) == text
