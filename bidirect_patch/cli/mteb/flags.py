"""The flags of `bidirect-patch mteb`."""

import argparse

from .. import Parser
from ..output_folder import check_output_dir
from ..ranges import COUNT, check_range, check_text


def read(argv: list[str]) -> argparse.Namespace:
    """Read and check the flags.

    Raises:
        ConfigError: One cannot be used.
    """
    flags = _parser().read(argv)
    for name, value in vars(flags).items():
        check_text(name, value)
    check_output_dir(flags.output_dir, "a folder for the results")
    check_range("batch_size", flags.batch_size, COUNT)
    return flags


def _parser() -> Parser:
    parser = Parser(
        prog="bidirect-patch mteb",
        description="Evaluate an encoder on tasks of MTEB. The encoder is a folder or hub name of this package or of LLM2Vec, or "
        "the settings.json that `bidirect-patch sweep` writes. Instructions stand before the queries of each task where the "
        "encoder was trained with instructions. Results of tasks that are in the folder already are taken from there.",
        epilog="example: bidirect-patch mteb encoder --tasks STS16 SciFact my_pairs.csv --output_dir results",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or the settings.json of a sweep")
    parser.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        required=True,
        help="names of mteb's tasks; or .csv and .jsonl files of sentence1, sentence2 and score",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="where the results are written")
    parser.add_argument("--peft_model_name_or_path", metavar="NAME", help="the adapter of LLM2Vec over MODEL")
    parser.add_argument(
        "--task_to_instructions_fp",
        metavar="FILE",
        help="JSON of tasks and instructions, as LLM2Vec's task_to_instructions.json; it gives instructions to any encoder. "
        "By default those of mteb, if the encoder was trained with instructions",
    )
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="texts at a time (default 32)")
    parser.add_argument("--overwrite", action="store_true", help="evaluate again what the folder has results of")
    parser.add_loading_arguments()
    return parser
