"""The command: `bidirect-patch COMMAND ...`, also as `python -m bidirect_patch COMMAND ...`.

Each command is a module here with `run(argv) -> exit code`, imported when it is asked for.
"""

import argparse
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..errors import BidirectPatchError, ConfigError

COMMANDS = {
    "demo": "show the whole way on a small model, with no network",
    "check": "prove layer by layer what a model attends to",
    "mntp": "train a model for masked next token prediction",
    "simcse": "train it further with SimCSE or on supervised pairs",
}
USAGE = "usage: bidirect-patch COMMAND ...\n\n" + "".join(f"  {name:8}{what}\n" for name, what in COMMANDS.items())
USAGE += "\nbidirect-patch COMMAND --help tells more.\n"


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for bad input (one line on stderr) or 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except BidirectPatchError as error:
        print(f"bidirect-patch: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bidirect-patch: interrupted", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, where argparse prints the usage first."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` tells more")


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        raise ConfigError(f"no command {command!r}; {hint}")
    return import_module(f".{command}", __name__).run(rest)
