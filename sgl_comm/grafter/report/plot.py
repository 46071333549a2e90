"""A report's plot: relative L2 of each tensor in order, and by layer and step. matplotlib is imported here alone, when
something is drawn, and without a display.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.report.data import ReportData, Row, largest
from sgl_comm.grafter.report.labels import shortened, tags_label
from sgl_comm.grafter.report.wording import tensor_label

SUFFIXES = (".png", ".svg")
"""What a plot's file may end in."""

_WIDTH_IN, _DPI = 9.0, 100
_NAMED_ROWS = 40
_WRITTEN_CELLS = 14
_BLUE, _RED, _GREY = "#2b6cb0", "#c92a2a", "#8a929b"
_TINIEST, _HUGEST = 1e-200, 1e200


def draw(report: ReportData, path: str | Path) -> None:
    """See ``Report.draw``."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise SglCommError(f"grafter: got plot file {str(path)!r}; expected one that ends in {' or '.join(SUFFIXES)}")
    with _drawing():
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure(report).savefig(path, format=suffix[1:], dpi=_DPI, metadata=metadata)


def png(report: ReportData, dpi: int = _DPI) -> bytes:
    """The plot as a PNG file's bytes.

    Raises:
        SglCommError: matplotlib is not installed.
    """
    with _drawing():
        file = io.BytesIO()
        figure(report).savefig(file, format="png", dpi=dpi)
        return file.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    """matplotlib with its own defaults, whatever the user has set; unknown letters are drawn as boxes, quietly."""
    import warnings

    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise SglCommError(
            'grafter: got a plot to draw; expected matplotlib to be installed (pip install "sgl_comm[report]")'
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "sgl_comm", "axes.axisbelow": True})
        yield


def figure(report: ReportData) -> Any:
    """The plot as a ``matplotlib.figure.Figure``; panels are its axes."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.comparison is not None]
    layered = [row for row in rows if _Tick.of(row, "layer").is_given]
    grid = _Grid.of(layered)
    labels = _labels(rows) if len(rows) <= _NAMED_ROWS else []
    heights = [3.2 + 0.055 * max(map(len, labels), default=0)]
    if layered:
        heights.append(1.0 + 0.3 * min(max(len(grid.steps), 3), 16) if len(grid.steps) > 1 else 2.6)
    drawn = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
    axes = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    scale = _Scale.of(rows, report.threshold)
    _draw_order(axes[0], rows, labels, scale, report.first)
    if layered and len(grid.steps) > 1:
        _draw_grid(axes[1], grid, scale, report.first)
    elif layered:
        _draw_layers(axes[1], layered, grid, scale, report.first)
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        drawn.legend(handles, names, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return drawn


@dataclasses.dataclass(frozen=True)
class _Scale:
    """The logarithmic axis: from a decade below what is there to a decade above.

    Attributes:
        floor: where a 0 is drawn.
        ceiling: where infinities and NaNs are.
        threshold: as it is; 0 has no line.
    """

    floor: float
    ceiling: float
    threshold: float

    @staticmethod
    def of(rows: Sequence[Row], threshold: float) -> _Scale:
        values = [value for row in rows if 0 < (value := _rel_l2(row)) < math.inf]
        values += [threshold] if threshold > 0 else []
        lowest, highest = (min(values), max(values)) if values else (1e-7, 1e-1)
        return _Scale(max(lowest / 10, _TINIEST), min(max(highest, _TINIEST * 100) * 10, _HUGEST), threshold)

    def height(self, value: float) -> float:
        """Where a value is drawn."""
        return min(max(value, self.floor), self.ceiling) if value < math.inf else self.ceiling  # a NaN is not

    def set_up(self, axis: Any) -> None:
        """The vertical axis of a panel with points."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.set_ylim(self.floor / 2, self.ceiling * 2)
        axis.yaxis.set_major_locator(LogLocator(numticks=9))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axis.set_ylabel("relative L2")
        if self.threshold > 0:
            label = f"threshold {self.threshold:g}"
            axis.axhline(self.threshold, color=_RED, linestyle="--", linewidth=1, label=label)


def _draw_order(axis: Any, rows: Sequence[Row], labels: Sequence[str], scale: _Scale, first: Row | None) -> None:
    axis.set_title("Relative L2 of each tensor, in order", loc="left", fontsize=10, pad=22)
    scale.set_up(axis)
    positions = list(range(len(rows)))
    if not rows:
        axis.set_xticks([])
        axis.text(0.5, 0.8, "nothing was compared", transform=axis.transAxes, ha="center", va="center", color=_GREY)
        return
    axis.plot(positions, [scale.height(_rel_l2(row)) for row in rows], color="#c9ced6", linewidth=1, zorder=1)
    _draw_points(axis, positions, rows, scale)
    margin = 0.6 + len(rows) / 100
    axis.set_xlim(-margin, len(rows) - 1 + margin)
    if labels:
        axis.set_xticks(positions, labels, rotation=90, fontsize=7.5, parse_math=False)
    else:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        def sequence(position: float, _: object) -> str:
            return str(rows[round(position)].sequence) if 0 <= position < len(rows) else ""

        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(sequence))
        axis.set_xlabel("sequence")
    if first is not None:
        position = next(index for index, row in enumerate(rows) if row is first)
        axis.axvline(position, color=_RED, linewidth=1, linestyle=":", zorder=1)
        _ring(axis, position, scale.height(_rel_l2(first)))
        side = ("left", "center", "right")[3 * position // len(rows)]
        axis.annotate(
            f"first divergence: {shortened(tensor_label(first), 48)}", (position, 1),
            xycoords=axis.get_xaxis_transform(), xytext=(0, 5), textcoords="offset points", ha=side, va="bottom",
            color=_RED, fontsize=9, fontweight="bold", parse_math=False,
        )  # fmt: skip


def _draw_points(axis: Any, positions: Sequence[int], rows: Sequence[Row], scale: _Scale) -> None:
    """Four kinds of marks, each with its line in the legend if there is one of it."""
    kinds: dict[str, list[int]] = {"equal": [], "near": [], "far": [], "beyond": []}
    for index, row in enumerate(rows):
        value = _rel_l2(row)
        kind = "beyond" if not value < math.inf else "far" if row.diverges else "near" if value else "equal"
        kinds[kind].append(index)
    size = 34 if len(rows) <= 200 else 10
    styles = {
        "near": {"marker": "o", "color": _BLUE, "label": "does not diverge"},
        "far": {"marker": "o", "color": _RED, "label": "diverges"},
        "equal": {"marker": "o", "facecolors": "white", "edgecolors": _BLUE, "label": "0, drawn at the bottom"},
        "beyond": {"marker": "^", "color": _RED, "label": "infinite or NaN, drawn at the top"},
    }
    for kind, style in styles.items():
        if found := kinds[kind]:
            heights = [scale.height(_rel_l2(rows[index])) for index in found]
            axis.scatter([positions[index] for index in found], heights, s=size, zorder=3, **style)


def _ring(axis: Any, x: float, y: float) -> None:
    axis.scatter([x], [y], s=170, facecolors="none", edgecolors=_RED, linewidths=1.8, zorder=4)


@dataclasses.dataclass(frozen=True, order=True)
class _Tick:
    """A tag's value on an axis: first that of rows without such a tag, then numbers, then texts."""

    kind: int
    number: int = 0
    text: str = ""

    @staticmethod
    def of(row: Row, tag: str) -> _Tick:
        value = row.tags.get(tag)
        if type(value) is int:
            return _Tick(1, number=value)
        return _Tick(2, text=value) if type(value) is str else _Tick(0)

    @property
    def is_given(self) -> bool:
        return self.kind > 0

    def __str__(self) -> str:
        return shortened(("none", str(self.number), self.text)[self.kind], 16)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Rows by layer and step, each in order."""

    layers: tuple[_Tick, ...]
    steps: tuple[_Tick, ...]
    cells: dict[tuple[int, int], list[Row]]

    @staticmethod
    def of(rows: Sequence[Row]) -> _Grid:
        layers = sorted({_Tick.of(row, "layer") for row in rows})
        steps = sorted({_Tick.of(row, "step") for row in rows})
        columns, lines = ({value: index for index, value in enumerate(values)} for values in (layers, steps))
        cells: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            cells.setdefault((lines[_Tick.of(row, "step")], columns[_Tick.of(row, "layer")]), []).append(row)
        return _Grid(tuple(layers), tuple(steps), cells)


def _draw_grid(axis: Any, grid: _Grid, scale: _Scale, first: Row | None) -> None:
    """A heat map of the largest relative L2 of a layer and step; white at the threshold, red above."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = math.log10(scale.floor), math.log10(scale.ceiling)
    centre = math.log10(scale.threshold) if scale.threshold > 0 else low
    norm = TwoSlopeNorm(max(centre, low + 1e-3), low, high)
    colours = colormaps["RdBu_r"].with_extremes(bad="#eceef1", under="#0b2545", over="#5c0a12")
    values = np.full((len(grid.steps), len(grid.layers)), np.nan)
    written = max(values.shape) <= _WRITTEN_CELLS
    for (line, column), rows in grid.cells.items():
        worst = largest(_rel_l2(row) for row in rows)
        beyond = not worst < math.inf or any(_is_uneven(row, scale.threshold) for row in rows)
        values[line, column] = high + 1 if beyond else low - 1 if worst == 0 else math.log10(scale.height(worst))
        if written:
            shade = norm(values[line, column])
            colour = "white" if beyond or not 0.2 < shade < 0.8 else "#1b1f24"
            axis.text(column, line, f"{worst:.1e}" if 0 < worst < math.inf else f"{worst:g}", ha="center", va="center",
                      fontsize=8, color=colour)  # fmt: skip
    image = axis.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    bar = axis.figure.colorbar(image, ax=axis, extend="both", pad=0.015, aspect=14)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{value:+03.0f}"))
    bar.ax.minorticks_off()
    _label_ticks(axis.xaxis, grid.layers)
    _label_ticks(axis.yaxis, grid.steps)
    axis.set_xlabel("layer")
    axis.set_ylabel("step")
    title = "Largest relative L2 by layer and step (darkest blue: 0; darkest red: infinite, NaN, or on one side alone)"
    axis.set_title(title, loc="left", fontsize=10)
    for (line, column), rows in grid.cells.items():
        if any(row is first for row in rows):
            edge = Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.2, zorder=5)
            edge.set_gid("first divergence")
            axis.add_patch(edge)


def _draw_layers(axis: Any, rows: Sequence[Row], grid: _Grid, scale: _Scale, first: Row | None) -> None:
    axis.set_title("Relative L2 by layer", loc="left", fontsize=10)
    scale.set_up(axis)
    columns = {value: index for index, value in enumerate(grid.layers)}
    positions = [columns[_Tick.of(row, "layer")] for row in rows]
    _draw_points(axis, positions, rows, scale)
    for position, row in zip(positions, rows, strict=True):
        if row is first:
            _ring(axis, position, scale.height(_rel_l2(row)))
    axis.set_xlim(-0.6, len(grid.layers) - 0.4)
    _label_ticks(axis.xaxis, grid.layers)
    axis.set_xlabel("layer")


def _label_ticks(axis: Any, ticks: Sequence[_Tick]) -> None:
    """Labels of an axis on which the n-th tick is at n; at most 40 of them, evenly spaced."""
    positions = range(0, len(ticks), -(-len(ticks) // _NAMED_ROWS))
    labels = [str(ticks[position]) for position in positions]
    axis.set_ticks(list(positions), labels, fontsize=8, parse_math=False)


def _labels(rows: Sequence[Row]) -> list[str]:
    """Names; with those tags that differ among the rows of one name, where it is not the only one."""
    names = Counter(row.name for row in rows)
    labels = []
    for row in rows:
        alike = [other.tags for other in rows if other.name == row.name]
        differing = (
            {tag: value for tag, value in row.tags.items() if any(other.get(tag) != value for other in alike)}
            if names[row.name] > 1
            else {}
        )
        labels.append(shortened(" ".join(filter(None, [row.name or "(no name)", tags_label(differing)])), 44))
    return labels


def _rel_l2(row: Row) -> float:
    assert row.comparison is not None
    return row.comparison.rel_l2


def _is_uneven(row: Row, threshold: float) -> bool:
    """Whether it diverges though its error is small: by NaNs or infinities of one side alone."""
    return row.diverges and _rel_l2(row) <= threshold
