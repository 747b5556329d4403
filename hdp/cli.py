"""``hdp``: the command line. One subcommand a module of :mod:`hdp.commands`, found by name and imported when it is used.

A command module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code. Only the
module of the command in use is imported, so that the command line starts fast and needs no torch unless its command does.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

from hdp import commands


def command_names() -> list[str]:
    """Modules of :mod:`hdp.commands`; those that begin with an underscore are not commands."""
    return sorted(m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; the arguments of ``command`` alone are known, the others are only listed."""
    parser = argparse.ArgumentParser(prog="hdp", description="Hybrid data parallelism for PyTorch.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in command_names():
        if name != command and command is not None:
            parsers.add_parser(name)
            continue
        module = import_module(f"{commands.__name__}.{name}")
        sub = parsers.add_parser(name, help=module.HELP, description=module.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Without a command, or with ``--help``, lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    parsed = make_parser(command if command in command_names() else None).parse_args(arguments)
    return int(import_module(f"{commands.__name__}.{parsed.command}").run(parsed))


if __name__ == "__main__":
    sys.exit(main())
