"""Progress bars of all commands: shown in a terminal, and not written into a file or a pipe."""

import sys
from typing import Any

import datasets
from transformers.utils import logging


def hide_bars_in_files(training: Any) -> None:
    """Turn the bars off where stderr is no terminal. The lines of the log are printed all the same.

    Args:
        training: The training arguments, whose `disable_tqdm` is set.
    """
    if not sys.stderr.isatty():
        training.disable_tqdm = True
    if training.disable_tqdm:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
