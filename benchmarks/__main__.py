"""``python -m benchmarks COMMAND``; each command is a module of this package with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from benchmarks import calibrate, decode, load, memory, plan, quality, reload

COMMANDS: dict[str, ModuleType] = {
    "load": load,
    "reload": reload,
    "memory": memory,
    "plan": plan,
    "decode": decode,
    "quality": quality,
    "calibrate": calibrate,
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one benchmark; the exit status is 0 when every run came through."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=sys.modules["benchmarks"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about = module.__doc__ or ""
        command = commands.add_parser(name, help=about.partition("\n")[0], description=about)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    status: int = COMMANDS[options.command].run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
