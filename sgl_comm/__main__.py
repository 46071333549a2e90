"""``python -m sgl_comm <command>``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sgl_comm.tools import command_line

COMMANDS = {
    "bench": ("sgl_comm.tools.bench", "time all-reduce beside gloo, or NCCL and symmetric memory"),
    "graft-report": ("sgl_comm.tools.graft_report", "show where two grafted systems begin to differ"),
}
"""Name -> the module, of which ``add_arguments`` fills the command's parser, and what it is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. Imports no other command's module."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m sgl_comm", description="Tools of sgl_comm.", epilog=command_line.STATUSES
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name, (module_name, purpose) in COMMANDS.items():
        module = importlib.import_module(module_name) if name == wanted else None
        command = commands.add_parser(
            name, help=purpose, description=module and module.__doc__, epilog=command_line.STATUSES
        )
        if module is not None:
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    return args.main(args)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
