"""``python -m sgl_comm graft-report``: what grafters have written into a folder, as one table.

The exit status is 0 if nothing diverges, 1 if a tensor diverges or an exchange failed, 2 if the folder cannot be read
or a file cannot be written.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.report import DEFAULT_THRESHOLD, Report, plot
from sgl_comm.tools import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``graft-report``."""
    parser.add_argument("folder", metavar="DIR", help="the grafters' report_dir, with the files of both sides")
    parser.add_argument(
        "--threshold", type=_threshold, default=DEFAULT_THRESHOLD, metavar="REL_L2",
        help=f"a tensor diverges above this relative L2 (default {DEFAULT_THRESHOLD:g})",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with the table and the plot too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw the errors too ({' or '.join(plot.SUFFIXES)})")
    parser.set_defaults(main=functools.partial(main, parser=parser))


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints and writes the report; the exit status."""
    for name in ("markdown", "html", "plot"):
        file: Path | None = getattr(args, name)
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"--{name}: no such folder: {file.absolute().parent}")
    if args.plot is not None and args.plot.suffix.lower() not in plot.SUFFIXES:
        parser.error(f"--plot: {args.plot} does not end in {' or '.join(plot.SUFFIXES)}")
    try:
        report = Report.read(args.folder, args.threshold)
    except (SglCommError, OSError) as error:
        return _cannot(error)
    _print(report.text())
    try:
        if args.markdown:
            args.markdown.write_text(report.markdown(), encoding="utf-8")
        if args.html:
            args.html.write_text(report.html(), encoding="utf-8")
        if args.plot:
            report.draw(args.plot)
    except (SglCommError, OSError) as error:
        return _cannot(error)
    return int(report.failed)


def _cannot(error: Exception) -> int:
    print(f"sgl_comm: {error}", file=sys.stderr)
    return command_line.CANNOT


def _print(text: str) -> None:
    """Prints a text; letters that the terminal does not have become escape sequences."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no threshold: expected a number from 0 on")
    return value
