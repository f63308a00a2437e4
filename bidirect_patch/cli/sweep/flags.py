"""The flags of `bidirect-patch sweep`."""

import argparse
import os

from ...errors import ConfigError
from .. import Parser
from ..output_folder import check_output_dir
from ..ranges import check_text


def read(argv: list[str]) -> argparse.Namespace:
    """Read and check the flags.

    Raises:
        ConfigError: One cannot be used, or the folder for the result is there already and not empty.
    """
    flags = _parser().read(argv)
    for name, value in vars(flags).items():
        check_text(name, value)
    if flags.output_dir is not None:
        check_output_dir(flags.output_dir, "a folder for the encoder")
        if os.path.lexists(flags.output_dir) and os.listdir(flags.output_dir):
            raise ConfigError(f"output_dir {flags.output_dir} is there already and is not empty: give another")
    return flags


def _parser() -> Parser:
    parser = Parser(
        prog="bidirect-patch sweep",
        description="Find out what to do with a model before any training. On scored pairs of texts it measures causal "
        "attention, bidirectional attention, and bidirectional attention with a first token that stays causal (a sink token), "
        "seen by all layers or hidden from the last one or two; each after every layer, with several poolings, centred or not. "
        "It prints the best setup of each attention and the settings of the best of all for `mntp` and `simcse`.",
        epilog="example: bidirect-patch sweep HuggingFaceTB/SmolLM2-135M-Instruct --eval_sts dev.csv --test_file test.csv "
        "--output_dir encoder",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    parser.add_argument(
        "--eval_sts", metavar="FILE", required=True, help=".csv or .jsonl of sentence1, sentence2 and score: to choose on"
    )
    parser.add_argument("--test_file", metavar="FILE", help="the same, on which the chosen setups are measured too")
    parser.add_argument("--gguf_file", metavar="FILE", help="load this GGUF file of the model's folder")
    parser.add_argument(
        "--output_dir", metavar="FOLDER", help="write the best setup here, as a folder for sentence-transformers"
    )
    parser.add_loading_arguments()
    return parser
