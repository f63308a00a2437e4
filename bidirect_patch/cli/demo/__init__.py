"""`bidirect-patch demo`: every step on a small model, with no network.

A causal Llama that comes with the package is shown to be causal. It is made bidirectional, and shown to be so. It is
trained for masked next token prediction on Python's own documentation, saved, and opened again.
"""

import argparse
import os
import warnings
from collections.abc import Callable

from transformers.utils import logging

from ...errors import ConfigError
from .. import Parser, check_training_packages
from .texts import SHIPPED, held_out_and_training_topics, paragraphs

__all__ = ["SHIPPED", "held_out_and_training_topics", "paragraphs", "run"]


def run(argv: list[str]) -> int:
    """Show every step.

    Returns:
        0 if the saved model opens again as it was, else 1.

    Raises:
        BackendError: A package that training needs is not installed.
        ConfigError: A flag, a folder or a model cannot be used.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    options = _parser().read(argv)
    if options.gguf_file and not options.model:
        raise ConfigError("--gguf_file names a file in a model's folder; give the folder with --model")
    check_training_packages(subject="the demo trains, and")
    # Imported here: this module needs the packages above.
    import datasets

    from .show import show

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries about how they call each other
        return show(options)


def _parser() -> Parser:
    parser = Parser(
        prog="bidirect-patch demo",
        description="Make a causal model bidirectional, prove it, train it for masked next token prediction on "
        "Python's own documentation, save it and open it again. Without --model it uses a tiny Llama that comes with "
        "the package, needs no network, and takes less than two minutes on two cores.",
        epilog="example: bidirect-patch demo --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 20",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="another causal model, from the hub or a folder")
    parser.add_argument("--gguf_file", metavar="FILE", help="load this GGUF file of the model's folder")
    parser.add_argument("--steps", type=_whole_number(1), default=80, help="training steps (default 80)")
    parser.add_argument(
        "--output_dir", metavar="FOLDER", type=_new_folder, help="where to save (default a temporary folder)"
    )
    parser.add_argument("--seed", type=_whole_number(0), default=0, help="of masks and training (default 0)")
    return parser


def _whole_number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return number


def _new_folder(path: str) -> str:
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise argparse.ArgumentTypeError(f"{path} is there already and isn't an empty folder; give another")
    return path
