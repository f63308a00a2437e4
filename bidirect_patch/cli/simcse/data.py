"""The training examples: single texts, pairs or triplets."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

from ...errors import ConfigError
from ..datafiles import READERS, reading
from .settings import TextArguments

ROLES = (
    "query",
    "anchor",
    "text",
    "sentence1",
    "sentence2",
    "positive",
    "negative",
)  # column names that are understood


def load_examples(texts: TextArguments) -> tuple[Any, bool]:
    """Load the training examples.

    Returns:
        A data set with the columns `anchor`, `positive` and, for triplets, `negative`. A single text is its own
        positive. For several files it is a DatasetDict by the names of the files. And whether the examples are single
        texts.

    Raises:
        ConfigError: There is no text, or the files hold examples of different kinds.
    """
    path = Path(texts.dataset_file_path or "")
    files = (
        sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl", ".json", ".csv"))
        if path.is_dir()
        else [path]
    )
    if not files:
        raise ConfigError(f"dataset_file_path {path} holds no .txt, .jsonl or .csv file")
    examples = {file.stem: _load_file(file, texts) for file in files}
    singles = {single for _, single in examples.values()}
    if len(singles) > 1:
        raise ConfigError(f"{path} mixes single texts with pairs: train on each by itself")
    sets = {name: data for name, (data, _) in examples.items()}
    return (DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))), singles.pop()


def first_example(data: Any) -> dict[str, str]:
    """Return the first example of a data set, or of the first data set in a DatasetDict."""
    return (next(iter(data.values())) if isinstance(data, dict) else data)[0]


def _load_file(file: Path, texts: TextArguments) -> tuple[Any, bool]:
    """Return the examples of one file, and whether they are single texts."""
    if not file.is_file() or file.suffix[1:] not in READERS:
        raise ConfigError(f"no .txt, .jsonl or .csv file {str(file)!r}: give dataset_file_path")
    with reading(str(file)):
        reader = READERS[file.suffix[1:]]
        data = load_dataset(reader, data_files=str(file), split="train", cache_dir=texts.cache_dir)
    columns = _text_columns(data, file)
    data = data.select_columns(columns).filter(lambda row: all(row[c] and not row[c].isspace() for c in columns))
    if texts.max_train_samples is not None:
        data = data.select(range(min(texts.max_train_samples, len(data))))
    if not len(data):
        raise ConfigError(f"there is no text in {file}")
    if len(columns) == 1:
        data = data.add_column("positive", data[columns[0]])
        return data.rename_column(columns[0], "anchor") if columns[0] != "anchor" else data, True
    roles = ("anchor", "positive", "negative")
    return data.map(lambda row: {new: row[old] for new, old in zip(roles, columns)}, remove_columns=columns), False


def _text_columns(data: Any, file: Path) -> list[str]:
    strings = [
        name for name, kind in data.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    columns = [name for name in ROLES if name in strings] or strings
    if not 1 <= len(columns) <= 3:
        raise ConfigError(f"{file} has {len(columns)} columns of text ({', '.join(columns)}); name 1 to 3 of {ROLES}")
    return columns
