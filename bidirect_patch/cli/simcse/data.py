"""The training examples: single texts, pairs or triplets."""

import logging
import re
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict, Features, Value, load_dataset

from ...errors import ConfigError
from ..datafiles import Kind, columns_of_text, files_in, reader_of, reading
from .instructions import instructions_of, names_of, split_by_prompt, tasks_of_one_kind, whole_tasks
from .settings import E5, TextArguments

logger = logging.getLogger(__name__)

# The names of columns that are understood.
QUERIES = ("query", "anchor", "sentence1", "sent0", "text")
POSITIVES = ("positive", "pos", "sentence2", "sent1")
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?", re.IGNORECASE)
TAKEN = (
    f"one column of texts; or {QUERIES[0]} (or {', '.join(QUERIES[1:])}), {POSITIVES[0]} (or {', '.join(POSITIVES[1:])}) and, if "
    "there are any, negative (or neg) or several, negative_1, negative_2 and so on"
)
IDENTIFIER = re.compile(r"(.*[_-])?(q|p|d|doc|gu|uu)?id|idx|index", re.IGNORECASE)  # holds no text to train on
SCORE = re.compile("score|label|similarity|relatedness|duplicate", re.IGNORECASE)


class Examples(NamedTuple):
    """The training examples.

    Attributes:
        data: A data set with the columns `anchor`, `positive` and, for triplets, `negative`, `negative_2` and so on. A single
            text is its own positive. For several tasks it is a DatasetDict by their names.
        single: Whether the examples are single texts.
        prompts: What stands before each anchor, by the name of the task. Empty if nothing does.
        of_one_kind: The tasks whose other texts have the prompt too.
    """

    data: Any
    single: bool
    prompts: dict[str, str]
    of_one_kind: frozenset[str] = frozenset()


def load_examples(texts: TextArguments) -> Examples:
    """Load the training examples.

    Raises:
        ConfigError: There is no text, the files hold examples of different kinds, it can't be told what a column is, a task
            has no instruction, or two files are tasks of one name.
    """
    path = Path(texts.dataset_file_path or "")
    files = [Path(file) for file in files_in(str(path))] if path.is_dir() else [path]
    whole = whole_tasks(texts, [file.stem for file in files])
    parts = [file.name for file in files if file.stem not in whole]
    if parts:
        logger.warning("%s: %s are left out, since their rows are in the files of the whole tasks", path, ", ".join(parts))
        files = [file for file in files if file.stem in whole]
    instructions = instructions_of(texts, whole)
    _check_names(files, instructions)
    if texts.max_train_samples is not None and texts.max_train_samples < len(files):
        raise ConfigError(f"max_train_samples must be at least {len(files)}, one for each file; got {texts.max_train_samples}")
    examples = {file.stem: _load_file(file, texts) for file in files}
    singles = {single for _, single in examples.values()}
    if len(singles) > 1:
        raise ConfigError(f"{path} mixes single texts with pairs: train on each by itself")
    counts = _share_out(texts.max_train_samples, {task: len(data) for task, (data, _) in examples.items()})
    sets: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    for task, (data, single) in examples.items():
        if single and any(instructions[task]):
            raise ConfigError(f"{path} holds single texts, which have no query for an instruction: give pairs")
        of_task, its_prompts = split_by_prompt(task, data.select(range(counts[task])), instructions[task])
        sets |= of_task
        prompts |= its_prompts
    data = DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))
    return Examples(data, singles.pop(), prompts, tasks_of_one_kind(texts))


def first_example(data: Any) -> dict[str, str]:
    """Return the first example of a data set, or of the first data set in a DatasetDict."""
    return (next(iter(data.values())) if isinstance(data, dict) else data)[0]


def _check_names(files: list[Path], instructions: dict[str, tuple[str, ...]]) -> None:
    """Raise ConfigError if two files give a data set of one name."""
    owners: dict[str, Path] = {}
    for file in files:
        for name in names_of(file.stem, instructions[file.stem]):
            if name in owners:
                raise ConfigError(
                    f"{owners[name]} and {file} both give a task {name!r}: rename one of them (a file is a task without its "
                    "ending, and a second instruction makes a task that ends in _2)"
                )
            owners[name] = file


def _share_out(limit: int | None, sizes: dict[str, int]) -> dict[str, int]:
    """Return how many examples are taken of each task: at most `limit` in all, and as many of each as can be."""
    if limit is None:
        return sizes
    counts: dict[str, int] = {}
    for done, task in enumerate(sorted(sizes, key=lambda task: sizes[task])):  # what small ones lack, the others take
        counts[task] = min(sizes[task], (limit - sum(counts.values())) // (len(sizes) - done))
    return counts


def _load_file(file: Path, texts: TextArguments) -> tuple[Any, bool]:
    """Return the examples of one file, and whether they are single texts."""
    reader = reader_of(str(file))
    if not file.is_file() or reader is None:
        raise ConfigError(f"no .txt, .jsonl or .csv file {str(file)!r}: give dataset_file_path")
    with reading(str(file)):
        data = load_dataset(reader, data_files=str(file), split="train", cache_dir=texts.cache_dir)
    of_e5 = [name for name in ("query", "positive", "negative") if name in data.column_names]
    if texts.dataset_name == E5 and len(of_e5) == 3:
        data = data.select_columns(of_e5)  # LLM2Vec reads no others
    kinds = columns_of_text(data.features)
    columns = _text_columns(data.column_names, kinds, file)
    data = _with_names(data.select_columns(columns), kinds, file)
    names = data.column_names
    whole = data.filter(lambda row: all(row[name] and not row[name].isspace() for name in names))
    if not len(whole):
        raise ConfigError(f"there is no text in {file}: no row has {', '.join(columns)}")
    if len(names) == 1:
        return whole.add_column("positive", whole["anchor"]), True
    if len(whole) < len(data):
        left_out = f"{len(data) - len(whole)} of {len(data)} rows"
        logger.warning("%s: %s are left out, since they lack one of %s", file, left_out, ", ".join(columns))
    return whole, False


def _text_columns(names: list[str], kinds: dict[str, Kind], file: Path) -> list[str]:
    """Return the columns to train on: that of single texts, or those of the query, the positive and the negatives."""
    texts = [name for name in kinds if not IDENTIFIER.fullmatch(name)]
    scores = [name for name in names if SCORE.search(name)]
    if scores and len([name for name in texts if name not in scores]) == 2:
        raise ConfigError(
            f"{file} has {', '.join(scores)} beside two texts, and simcse trains every pair as one of equal meaning: keep those "
            f"pairs alone, without {', '.join(scores)}. Pairs with scores are for validation_file and `bidirect-patch sweep`"
        )
    queries = [name for name in names if name.lower() in QUERIES]
    positives = [name for name in names if name.lower() in POSITIVES]
    columns = [*queries, *positives, *(name for name in texts if NEGATIVE.fullmatch(name))]
    if not columns and len(texts) <= 2:
        columns = texts
    elif len(columns) > 1 and not len(queries) == len(positives) == 1:
        columns = []
    if not columns or set(columns) != set(texts) or "other" in map(kinds.get, columns):
        raise ConfigError(
            f"{file} has the columns {', '.join(names)}, and of text {', '.join(texts) or 'none'}: simcse takes {TAKEN}. Rename "
            "columns to these, and take out the others that hold text"
        )
    return columns


def _with_names(data: Any, kinds: dict[str, Kind], file: Path) -> Any:
    """Return the texts by the names of `Examples`, in the order that the loss takes them in, and none of them in a list."""
    old = list(data.column_names)
    lengths = {name: _texts_in_lists(data, name, file) for name in old if kinds[name] == "list"}
    new = ["anchor", "positive", "negative", *(f"negative_{n}" for n in range(2, sum(lengths.values()) + len(old)))]
    if not lengths:
        data = data.rename_columns({name: f"_{name}" for name in old})  # so that no new name is an old one too
        return data.rename_columns({f"_{before}": after for before, after in zip(old, new)})

    def texts_of(row: dict[str, Any]) -> dict[str, str]:
        lists = ((row[name] or [None] * lengths[name]) if name in lengths else [row[name]] for name in old)
        return dict(zip(new, chain.from_iterable(lists)))

    new = new[: sum(lengths.get(name, 1) for name in old)]
    types = Features(dict.fromkeys(new, Value("string")))  # which the first rows don't tell if they lack a list
    return data.map(texts_of, remove_columns=old, features=types)


def _texts_in_lists(data: Any, name: str, file: Path) -> int:
    """Return how many texts each list of a column holds. A row without a list lacks its texts, as one with an empty cell does."""
    found = sorted({len(texts) for texts in data[name] if texts}) or [0]
    several = bool(NEGATIVE.fullmatch(name))
    if len(found) > 1 or found[0] < 1 or (found[0] > 1 and not several):
        lengths = " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))
        wanted = "a list of the same length in each row" if several else "one text in each row: write a row for each of them"
        raise ConfigError(f"{file}: {name} holds lists of {lengths} texts, and simcse takes {wanted}")
    return found[0]
