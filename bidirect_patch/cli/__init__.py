"""The command line: `bidirect-patch COMMAND ...`, or `python -m bidirect_patch COMMAND ...`.

Each command is a module or a package in this folder with a function `run(argv) -> exit code`. It is imported when it is
asked for.
"""

import argparse
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..errors import BidirectPatchError, ConfigError
from ..errors import extra_needed as extra_needed
from ..errors import one_line as one_line

COMMANDS = {
    "demo": "show every step on a small model, with no network",
    "check": "prove layer by layer what a model attends to",
    "sweep": "find a model's best setup before any training",
    "mntp": "train a model for masked next token prediction",
    "simcse": "train it further with SimCSE or on supervised pairs",
    "words": "train and evaluate a word-level task: parts of speech, names",
    "mteb": "evaluate an encoder on tasks of MTEB",
}
USAGE = f"""\
usage: bidirect-patch COMMAND ...

A causal decoder becomes a bidirectional encoder in three steps:

  1. Bidirectional attention. In Python: enable_bidirectional(model).
     The commands of the next two steps do this by themselves.
  2. mntp    {COMMANDS["mntp"]}
  3. simcse  {COMMANDS["simcse"]}

For labels of words instead of embeddings:

  words   {COMMANDS["words"]}

To look before you train, and after:

  check   {COMMANDS["check"]}
  sweep   {COMMANDS["sweep"]}
  demo    {COMMANDS["demo"]}
  mteb    {COMMANDS["mteb"]}

For example (MODEL is a folder or a name on the hub; texts.txt, a text a line):

  bidirect-patch check MODEL
  bidirect-patch mntp --model_name_or_path MODEL --train_file texts.txt \\
    --do_train --max_steps 1000 --output_dir mntp_out
  bidirect-patch simcse --model_name_or_path MODEL \\
    --peft_model_name_or_path mntp_out --dataset_file_path texts.txt \\
    --do_train --max_steps 1000 --output_dir encoder

bidirect-patch COMMAND --help tells more.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments. By default those of the process.

    Returns:
        The exit code: that of the command, 2 for bad input (with one line on stderr), 130 when interrupted.
    """
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
    """A parser that knows each flag by one name, with underscores, and that reports an error on one line."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument without the names that only spell another of its names with hyphens."""
        kept = [name for name in names if name == underscored(name) or underscored(name) not in names]
        return super().add_argument(*kept, **options)

    def add_loading_arguments(self) -> None:
        """Add the flags for how a model is loaded."""
        self.add_argument(
            "--torch_dtype",
            choices=("auto", "bfloat16", "float16", "float32"),
            default="float32",
            help="the type that the weights are loaded in (default float32)",
        )
        self.add_argument(
            "--attn_implementation", default="sdpa", help="the backend: eager, sdpa, flash_attention_2, ... (default sdpa)"
        )

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse arguments whose flags are spelled with underscores or with hyphens."""
        return self.parse_args([underscored(word) for word in argv])

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse would print the usage and exit."""
        raise ConfigError(f"{message}; `{self.prog} --help` tells more")


def check_training_packages(extra: str = "train", subject: str = "training") -> None:
    """Raise BackendError, naming the extra that brings it, if a package is missing that the training commands share."""
    with extra_needed(extra, subject=subject):
        import accelerate  # noqa: F401  (transformers' Trainer needs it)
        import datasets  # noqa: F401
        import peft  # noqa: F401


def underscored(word: str) -> str:
    """Spell a flag with underscores: `--some-flag=a-b` becomes `--some_flag=a-b`. Other words stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


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
