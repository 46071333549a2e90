"""A plot of what ``python -m sgl_comm bench --json`` wrote, a panel a file. Needs matplotlib.

python benchmarks/plot_all_reduce.py bench2.json bench4.json --out docs/all_reduce.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

NAMES = {"nccl": "NCCL", "nccl_symmetric": "NCCL, symmetric window", "symm_mem": "torch symmetric memory"}


def best_times(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by contender, ours first, the fastest algorithm of each competitor."""
    times = {"sgl_comm": row["ours"]["median_us"]}
    for other in row["others"]:
        name = other["name"].partition(" ")[0]
        times[name] = min(other["median_us"], times.get(name, float("inf")))
    return times


def size_text(num_bytes: float, _: object = None) -> str:
    """Bytes as 16K or 1M."""
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g}{unit}"
    return f"{num_bytes:g}"


def draw(axes: Axes, measured: dict[str, Any]) -> None:
    """Times over sizes, one line a contender."""
    setting, rows = measured["environment"], measured["rows"]
    for name in best_times(rows[0]):
        found = [(row["size"], best_times(row)[name]) for row in rows if name in best_times(row)]
        sizes, times = zip(*found, strict=True)
        ours = name == "sgl_comm"
        style = {"linewidth": 2.5, "color": "black"} if ours else {"linewidth": 1.2}
        axes.plot(sizes, times, marker="." if ours else None, label=NAMES.get(name, name), **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(size_text))
    axes.set_title(f"{setting['world']} x {setting['gpu'] or setting['cpu']}", fontsize=9)
    axes.set_xlabel(f"bytes ({setting['dtype']}, {setting['form']})")
    axes.grid(alpha=0.3)


def main() -> None:
    """Draws the panels side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, help="an .svg or .png file")
    args = parser.parse_args()
    figure, panels = pyplot.subplots(1, len(args.files), figsize=(4.2 * len(args.files), 4), sharey=True, squeeze=False)
    for axes, file in zip(panels[0], args.files, strict=True):
        draw(axes, json.loads(file.read_text()))
    panels[0][0].set_ylabel("microseconds an all-reduce")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
