"""``python -m sgl_comm <command>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sgl_comm.tools import bench, graft_report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sgl_comm", description="Tools of sgl_comm.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    bench.add_parser(commands)
    graft_report.add_parser(commands)
    args = parser.parse_args(argv)
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
