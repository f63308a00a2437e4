"""Sentences of words with one label each, from files or from a data set."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from ...errors import ConfigError
from ..datafiles import reading
from .files import NO_LABEL, POS, TOKENS, Columns, find_word_files, read_file
from .settings import Settings, TaskArguments, WordsTrainingArguments

Split = Literal["train", "validation", "test"]


class Sentence(NamedTuple):
    """Words, and a label for each; None where a word has none."""

    words: list[str]
    labels: list[str | None]


class Data(NamedTuple):
    """The sentences of each split that is used, and the labels: those of the data set in its order, else sorted."""

    sentences: dict[Split, list[Sentence]]
    labels: list[str]


def load_data(settings: Settings) -> Data:
    """Load the sentences: `train` with do_train, `validation` with do_eval, `test` with do_predict.

    Where there is no data for validation, it is held out of that for training.

    Raises:
        ConfigError: A file or a data set can't be read, or it lacks a split, a column or a label.
    """
    model, task, training = settings
    if task.dataset_name:
        sentences, labels = _from_dataset(settings)
    else:
        sentences, labels = _from_files(task, training), []
    for split, rows in sentences.items():
        limit = task.max_train_samples if split == "train" else task.max_eval_samples
        sentences[split] = rows = rows if limit is None else rows[:limit]
        if not any(label is not None for row in rows for label in row.labels):
            raise ConfigError(f"no word of the {split} data has a label in the column {task.task or 'of labels'}")
    there = {label for rows in sentences.values() for row in rows for label in row.labels if label is not None}
    return Data(sentences, labels or sorted(there))


def splits_in_use(training: WordsTrainingArguments) -> list[Split]:
    """The splits of data that a run needs."""
    asked = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    return [split for split, is_used in asked.items() if is_used]  # type: ignore[misc]


def _from_files(task: TaskArguments, training: WordsTrainingArguments) -> dict[Split, list[Sentence]]:
    sentences: dict[Split, list[Sentence]] = {}
    paths = {"train": task.train_file, "validation": task.validation_file, "test": task.test_file}
    used = splits_in_use(training)
    if "validation" in used and not paths["validation"]:
        sentences = _hold_out(_read(task.train_file or [], task), task)
    for split in used:
        if split not in sentences:
            sentences[split] = _read(paths[split] or [], task)
    return {split: sentences[split] for split in used}


def _read(paths: Iterable[str], task: TaskArguments) -> list[Sentence]:
    rows = []
    for path in find_word_files(list(paths)):
        for columns in read_file(path, task.columns):
            rows.append(Sentence(columns[TOKENS], _labels(columns, task, path)))
    return rows


def _labels(columns: Columns, task: TaskArguments, path: Path) -> list[str | None]:
    kinds = [name for name in columns if name != TOKENS]
    name = task.task
    if kinds == [""]:
        name = ""
    elif name is None:
        name = kinds[0] if len(kinds) == 1 else POS
    if name not in columns or name == TOKENS:
        there = f"it has {', '.join(kinds)}" if kinds else "it has none, with a label for each word"
        raise ConfigError(f"{path} has no column of labels {name}: give task; {there}")
    return [None if label == NO_LABEL else label for label in columns[name]]


def _from_dataset(settings: Settings) -> tuple[dict[Split, list[Sentence]], list[str]]:
    model, task, training = settings
    hub = {"cache_dir": model.cache_dir, "token": model.token}
    with reading(str(task.dataset_name)):
        loaded = datasets.load_dataset(task.dataset_name, task.dataset_config_name, **hub)
    used = splits_in_use(training)
    holds_out = "validation" in used and "validation" not in loaded
    wanted = {"train", *used} - {"validation"} if holds_out else {*used}
    sentences: dict[Split, list[Sentence]] = {}
    names: list[str] = []
    for split in sorted(wanted):
        if split not in loaded:
            raise ConfigError(f"{task.dataset_name} has no {split} split; it has {', '.join(loaded)}")
        sentences[split], names = _of_dataset(loaded[split], task)
    if holds_out:
        sentences |= _hold_out(sentences["train"], task)
    return {split: sentences[split] for split in used}, names


def _of_dataset(rows: Any, task: TaskArguments) -> tuple[list[Sentence], list[str]]:
    words = next((name for name in (TOKENS, "words") if name in rows.column_names), None)
    name = task.task or POS
    if words is None or name not in rows.column_names:
        lacking = TOKENS if words is None else name
        raise ConfigError(f"{task.dataset_name} has no column {lacking}; it has {', '.join(rows.column_names)}")
    feature = getattr(rows.features[name], "feature", None)
    names: list[str] = list(getattr(feature, "names", None) or [])
    sentences = []
    for place, row in enumerate(rows):
        if not isinstance(row[words], list) or not isinstance(row[name], list) or len(row[words]) != len(row[name]):
            raise ConfigError(f"{task.dataset_name}, row {place + 1}: a label for each word is needed")
        labels = [names[label] if names and label >= 0 else None if names else str(label) for label in row[name]]
        if row[words]:
            sentences.append(Sentence(row[words], labels))
    return sentences, names


def _hold_out(rows: list[Sentence], task: TaskArguments) -> dict[Split, list[Sentence]]:
    end = round(len(rows) * task.validation_split_percentage / 100)
    if end in (0, len(rows)):
        share = f"validation_split_percentage={task.validation_split_percentage}"
        raise ConfigError(
            f"too few sentences ({len(rows)}) to hold out {share} of them for do_eval: give validation_file"
        )
    return {"validation": rows[:end], "train": rows[end:]}
