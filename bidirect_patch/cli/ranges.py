"""Kinds of ranges, and the ranges of transformers' own arguments. A command checks its own settings in its `settings`.

transformers accepts most numbers, and training then fails late, with an error of another library, or learns nothing.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError

LARGEST = 2**31 - 1  # counts above it overflow in one library or another
LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one
LONGEST_SEQUENCE = 2**24  # tokens; no model reads more
LARGEST_RATE = 1e36  # Adam's first steps multiply it, and float32 ends at 3e38
LARGEST_RANK = 2**16  # of an adapter; no model is as wide


class Range(NamedTuple):
    """The numbers from `low` to `high`. An `open` end does not belong to the range."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Say whether a number is in the range. NaN and infinity are in none."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high or self.high == math.inf else value <= self.high
        return above and below

    def rule_for(self, value: float) -> str:
        """Return what a number that is not in the range should be."""
        if self.high == 1:
            return f"in {'(' if self.open_low else '['}{self.low:g}, 1{')' if self.open_high else ']'}"
        if value > self.low:
            return "finite" if self.high == math.inf else f"at most {self.high}"
        if self.open_low:
            return f"above {self.low:g}"
        return f"at least {self.low:g}" if self.low > 0 else f"{self.low:g} or more"


COUNT, COUNT_OR_ZERO, NUMBER, SHARE = Range(1, LARGEST), Range(0, LARGEST), Range(0), Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)
WORKERS, RANK = Range(0, 4096), Range(0, LARGEST_RANK)

# The numbers among transformers' training arguments. A release that lacks one of them is not checked for it.
TRAINING_RANGES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), COUNT
    ),
    **dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("save_total_limit", "eval_delay", "ddp_timeout", "warmup_steps"), COUNT_OR_ZERO),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha"), NUMBER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BELOW_ONE),
    **dict.fromkeys(("seed", "data_seed"), Range(0, LARGEST_SEED)),
    # A share of all steps below 1.
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), Range(0, LARGEST, open_low=True)),
    "learning_rate": Range(0, LARGEST_RATE),
    "dataloader_num_workers": WORKERS,
    "warmup_ratio": SHARE,
    "max_steps": Range(-1, LARGEST),
    "num_train_epochs": Range(0, LARGEST, open_low=True),
}


def check_range(name: str, value: float | None, allowed: Range) -> None:
    """Raise ConfigError if a number is given and not in its range."""
    if value is not None and not allowed.holds(value):
        raise ConfigError(f"{name} must be {allowed.rule_for(value)}; got {value}")


def check_training_numbers(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if one of transformers' training arguments is out of its range.

    Args:
        values: All settings by name.
    """
    unused = {"num_train_epochs"} if values["max_steps"] > 0 else set()
    for name, strategy in (("eval", "evaluation_strategy"), ("save", "save_strategy"), ("logging", "logging_strategy")):
        chosen = values.get(f"{name}_strategy", values.get(strategy))
        if getattr(chosen, "value", chosen) != "steps":
            unused.add(f"{name}_steps")
    for name, allowed in TRAINING_RANGES.items():
        if name not in unused:
            check_range(name, values.get(name), allowed)


def check_text(name: str, value: Any) -> None:
    """Raise ConfigError if a string can be no path and no name: it holds NUL, or half of a surrogate pair."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise ConfigError(f"{name} holds a character that no path and no name can have: {text!r}")
