"""How `--help` of a training command is laid out: examples, its settings with their own help texts, some of transformers."""

import argparse
from collections.abc import Iterable
from typing import Any

ALL = "--help_all"  # shows every setting
USED = frozenset(  # settings of transformers' TrainingArguments
    """output_dir overwrite_output_dir do_train do_eval max_steps num_train_epochs learning_rate lr_scheduler_type
    warmup_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps bf16
    eval_strategy evaluation_strategy eval_steps save_strategy save_steps save_total_limit logging_steps
    load_best_model_at_end metric_for_best_model seed report_to resume_from_checkpoint""".split()
)
NOTES = f"""
A setting that is on by default is turned off by --no_NAME. In a settings file
the names are the same, without the dashes; a flag wins over the file.

All of transformers' TrainingArguments are settings too: {ALL} lists them.
"""
VALUES = {int: "N", float: "X", str: "TEXT"}  # what stands for a value, by its type
FEW = 4  # choices that are listed as they are


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples, and names a default where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.help and type(default) in (int, float, str) and default != argparse.SUPPRESS:
            return f"{action.help} (default {default})"
        return action.help


def shorten(parser: argparse.ArgumentParser, own: Iterable[str], *, show_all: bool) -> None:
    """Make the help of a parser of settings short, in place.

    Args:
        parser: The parser.
        own: The names of the command's own settings.
        show_all: Show the others too.
    """
    shown = USED.union(own)
    for action in parser._actions:
        switched_off = action.nargs == 0 and any(flag.startswith("--no_") for flag in action.option_strings)
        if switched_off or not (show_all or action.dest in shown or action.dest == "help"):
            action.help = argparse.SUPPRESS
        elif action.dest != "help":
            action.metavar = _value(action)


def _value(action: argparse.Action) -> Any:
    if action.nargs == "?":
        return "BOOL"
    if action.choices is not None and len(list(action.choices)) <= FEW:
        return None  # argparse lists them
    kind = action.type if isinstance(action.type, type) else str
    return VALUES.get(kind, "VALUE")
