"""The plot of the grafter's report: what it shows, its files, and what there is without matplotlib."""

from __future__ import annotations

import builtins
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from helpers.graft_files import EQUAL, EVIL, errors, header, write, write_model, writer_of
from sgl_comm.__main__ import main
from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.header import Header
from sgl_comm.grafter.report import Report, plot


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_the_plot_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    write_model(tmp_path)
    report = Report.read(tmp_path)
    report.draw(tmp_path / "plot.png")
    width, height = png_size((tmp_path / "plot.png").read_bytes())
    assert width == 900
    assert 400 < height < 1200
    report.draw(tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert "</svg>" in svg
    assert "layers.3.mlp" in svg
    report.draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg, "a plot depends on its report alone"
    with pytest.raises(SglCommError, match=r"got plot file .*plot.exe'; expected one that ends in .png or .svg"):
        report.draw(tmp_path / "plot.exe")
    assert png_size(plot.png(report, dpi=50)) == (450, height // 2)
    page = report.html()
    assert page.count("data:image/png;base64,") == 1
    assert "There is no plot" not in page


def points(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """Label -> the points of that kind."""
    return {each.get_label(): [tuple(p) for p in each.get_offsets().tolist()] for each in axis.collections}


def test_what_the_plot_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_model(tmp_path)
    order, grid, *_ = plot.figure(Report.read(tmp_path)).axes
    assert order.get_yscale() == "log"
    shown = points(order)
    assert shown["diverges"][0] == (3, pytest.approx(0.03))
    assert [x for x, _ in shown["diverges"]] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert [x for x, _ in shown["does not diverge"]] == [1, 2, 7, 8, 13, 14]
    zeros = shown["0, drawn at the bottom"]
    low, high = order.get_ylim()
    assert [x for x, _ in zeros] == [0, 6, 12]
    assert all(low < y < 1e-6 for _, y in zeros), "below all others, and inside the panel"
    hollow = next(each for each in order.collections if each.get_label() == "0, drawn at the bottom")
    assert hollow.get_facecolors()[0].tolist() == [1, 1, 1, 1]
    assert high > 0.07
    lines = {line.get_label(): line for line in order.get_lines()}
    assert set(lines["threshold 0.0001"].get_ydata()) == {1e-4}
    (label,) = order.texts
    assert label.get_text() == "first divergence: #3 b2t layers.3.mlp layer=3,step=0"
    assert label.xy == (3, 1)
    ticks = [tick.get_text() for tick in order.get_xticklabels()]
    assert ticks[:2] == ["layers.0.mlp step=0", "layers.1.mlp step=0"]
    assert len(ticks) == 18

    (image,) = grid.get_images()
    values = image.get_array()
    assert values.shape == (3, 6)
    assert values[0, 3] == pytest.approx(math.log10(0.03))
    assert values[2, 5] == pytest.approx(math.log10(0.07))
    assert values[0, 0] < image.norm.vmin, "0 has a colour of its own"
    assert image.norm(math.log10(1e-4)) == pytest.approx(0.5)
    (edge,) = grid.patches
    assert edge.get_xy() == (2.5, -0.5)


def test_one_step_is_shown_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [(header(i, n, layer=layer), errors(rel)) for i, (n, layer, rel) in enumerate(
        [("mlp", 10, 1e-6), ("mlp", 2, math.inf), ("attn", 2, 1e-7), ("attn", 10, math.nan), ("attn", "x", 1e-3)]
    )]  # fmt: skip
    write(tmp_path, [*found, (header(9, "lm_head", layer=None), EQUAL)])
    order, by_layer = plot.figure(Report.read(tmp_path)).axes
    assert [tick.get_text() for tick in by_layer.get_xticklabels()] == ["2", "10", "x"]
    shown = points(by_layer)
    assert [x for x, _ in shown["infinite or NaN, drawn at the top"]] == [0, 1]
    assert all(1e-3 < y < by_layer.get_ylim()[1] for _, y in shown["infinite or NaN, drawn at the top"])
    assert shown["does not diverge"] == [(1, pytest.approx(1e-6)), (0, pytest.approx(1e-7))]
    assert [tick.get_text() for tick in order.get_xticklabels()] == [
        "mlp layer=10", "mlp layer=2", "attn layer=2", "attn layer=10", "attn layer=x", "lm_head",
    ]  # fmt: skip


def test_plots_of_odd_reports(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny, huge = errors(5e-324), errors(1e308)
    cases: dict[str, list[tuple[Header, Comparison]]] = {
        "equal": [(header(0, "x", layer=0, step=0), EQUAL), (header(1, "x", layer=0, step=1), EQUAL)],
        "names": [(header(0, f"$\\frac{EVIL}$" + "n" * 300, layer=EVIL, step=EVIL), errors(1.0)),
                  (header(1, "$", layer="$x_", step="漢"), errors(1.0))],
        "extremes": [(header(0, "x", layer=0, step=0), tiny), (header(1, "x", layer=1, step=1), huge)],
        "many": [(header(i, "x", layer=i % 50, step=i // 50), errors(1e-6 * i)) for i in range(2000)],
    }  # fmt: skip
    for name, found in cases.items():
        write(tmp_path / name, found)
        for threshold in (0.0, 1e-4):
            report = Report.read(tmp_path / name, threshold)
            assert png_size(plot.png(report))[0] == 900, name
    sends = writer_of(tmp_path / "alone", "baseline")
    sends.exchange(header(0, "x"), None, "sent", 32, 0.001)
    report = Report.read(tmp_path / "alone")
    (axis,) = plot.figure(report).axes
    assert [text.get_text() for text in axis.texts] == ["nothing was compared"]
    assert png_size(plot.png(report))[0] == 900


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path)
    imports = builtins.__import__

    def no_matplotlib(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imports(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    report = Report.read(tmp_path)
    with pytest.raises(SglCommError, match=r'expected matplotlib to be installed \(pip install "sgl_comm\[report\]"\)'):
        report.draw(tmp_path / "plot.png")
    page = report.html()
    assert "<img" not in page
    assert "There is no plot. " in page
    assert "pip install &quot;sgl_comm[report]&quot;" in page
    assert "layers.3.mlp" in page
    assert report.text()
    assert report.markdown()
    assert main(["graft-report", str(tmp_path), "--plot", str(tmp_path / "plot.png")]) == 2
    output = capsys.readouterr()
    assert "first divergence" in output.out
    assert output.err.count("\n") == 1
    assert "matplotlib" in output.err


def test_the_command_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_model(tmp_path / "run", bad_from=9)
    assert main(["graft-report", str(tmp_path / "run"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert png_size((tmp_path / "plot.png").read_bytes())[0] == 900
