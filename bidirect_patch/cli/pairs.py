"""Pairs of sentences with scores, to evaluate an encoder on."""

import math
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..errors import ConfigError
from .datafiles import READERS, reading

PAIR_COLUMNS = ("sentence1", "sentence2", "score")


def load_pairs(setting: str, path: str, cache_dir: str | None) -> Any:
    """Load the pairs to evaluate on.

    Args:
        setting: The name of the setting that gives the file.
        path: The file, .csv or .jsonl.
        cache_dir: Where the data's cache is kept.

    Returns:
        A data set with the columns `sentence1`, `sentence2` and `score`.

    Raises:
        ConfigError: The file cannot be read, a column is missing, or the scores are no numbers or all equal.
    """
    ending = Path(path).suffix[1:]
    if not Path(path).is_file() or READERS.get(ending) not in ("csv", "json"):
        raise ConfigError(f"no .csv or .jsonl file {path!r}: give {setting}, with {', '.join(PAIR_COLUMNS)}")
    with reading(path):
        pairs = load_dataset(READERS[ending], data_files=path, split="train", cache_dir=cache_dir)
    missing = [name for name in PAIR_COLUMNS if name not in pairs.column_names]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; it has {', '.join(pairs.column_names)}")
    wrong = _first_wrong(pairs)
    if wrong is not None:
        raise ConfigError(f"{path}, row {wrong + 1}: two texts and a number are needed; got {pairs[wrong]}")
    if len(set(pairs["score"])) < 2:
        raise ConfigError(f"{path} needs two different scores at least")
    return pairs


def _first_wrong(pairs: Any) -> int | None:
    for number, row in enumerate(pairs):
        texts = [row[name] for name in PAIR_COLUMNS[:2]]
        score = row["score"]
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
        if not is_number or not all(isinstance(text, str) and text.strip() for text in texts):
            return number
    return None
