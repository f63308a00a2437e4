"""The training examples: single texts, pairs or triplets."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict, load_dataset

from ...errors import ConfigError
from ..datafiles import READERS, reading
from .instructions import instructions_of, split_by_prompt
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
COLUMNS = ("anchor", "positive", "negative")  # what they become, in the order that the loss takes them in


class Examples(NamedTuple):
    """The training examples.

    Attributes:
        data: A data set with the columns `anchor`, `positive` and, for triplets, `negative`. A single text is its own
            positive. For several tasks it is a DatasetDict by their names.
        single: Whether the examples are single texts.
        prompts: What stands before each anchor, by the name of the task. Empty if nothing does.
    """

    data: Any
    single: bool
    prompts: dict[str, str]


def load_examples(texts: TextArguments) -> Examples:
    """Load the training examples.

    Raises:
        ConfigError: There is no text, the files hold examples of different kinds, or a task has no instruction.
    """
    path = Path(texts.dataset_file_path or "")
    files = (
        sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl", ".json", ".csv"))
        if path.is_dir()
        else [path]
    )
    if not files:
        raise ConfigError(f"dataset_file_path {path} holds no .txt, .jsonl or .csv file")
    instructions = instructions_of(texts, [file.stem for file in files])
    examples = {file.stem: _load_file(file, texts) for file in files}
    singles = {single for _, single in examples.values()}
    if len(singles) > 1:
        raise ConfigError(f"{path} mixes single texts with pairs: train on each by itself")
    sets: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    for task, (data, single) in examples.items():
        if single and any(instructions[task]):
            raise ConfigError(f"{path} holds single texts, which have no query for an instruction: give pairs")
        of_task, its_prompts = split_by_prompt(task, data, instructions[task])
        sets |= of_task
        prompts |= its_prompts
    return Examples(DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values())), singles.pop(), prompts)


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
        data = data.rename_columns({columns[0]: "anchor"}) if columns != ["anchor"] else data
        return data.add_column("positive", data["anchor"]), True
    # The loss takes the first column for the anchor, whatever the names are.
    data = data.rename_columns({old: f"_{old}" for old in columns})  # so that no new name is an old one too
    data = data.rename_columns({f"_{old}": new for new, old in zip(COLUMNS, columns)})
    return data.select_columns(list(COLUMNS[: len(columns)])), False


def _text_columns(data: Any, file: Path) -> list[str]:
    strings = [
        name for name, kind in data.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    columns = [name for name in ROLES if name in strings] or strings
    if not 1 <= len(columns) <= 3:
        raise ConfigError(f"{file} has {len(columns)} columns of text ({', '.join(columns)}); name 1 to 3 of {ROLES}")
    return columns
