"""Texts from files or the hub, as sequences of token ids."""

import os
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from ..errors import ConfigError
from . import one_line
from .arguments import DataArguments, MNTPTrainingArguments, ModelArguments

READERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv"}  # file ending -> builder of `datasets`
LONGEST = 1024  # tokens a sequence where neither the settings nor the tokenizer say less
PASS = "pass"  # the key of a streamed sequence that says how often the stream has started over


def load_texts(model: ModelArguments, data: DataArguments, training: MNTPTrainingArguments) -> dict[str, Any]:
    """The texts to use: `train` if do_train, `validation` if do_eval, which is held out of train if it isn't given.

    Raises:
        ConfigError: a file or data set that can't be read, or that lacks what is asked of it.
    """
    if data.dataset_name:
        source: dict[str, Any] = {"path": data.dataset_name, "name": data.dataset_config_name}
        given = _splits(source, model)
    else:
        named = {"train": data.train_file, "validation": data.validation_file}
        files = {split: path for split, path in named.items() if path}
        source = {"path": _reader(files), "data_files": files}
        given = set(files)
    wanted = {"train"} if training.do_train else set()
    texts = {}
    if training.do_eval:
        if "validation" in given:
            wanted.add("validation")
        elif data.streaming:
            texts = _hold_out_of_stream(_load(source, "train", model, streaming=True), data)
        else:
            whole = _load(source, "train", model)
            at = round(len(whole) * data.validation_split_percentage / 100)
            if at in (0, len(whole)):
                share = f"validation_split_percentage={data.validation_split_percentage}"
                raise ConfigError(f"too few texts ({len(whole)}) to hold out {share} of them for do_eval: give validation_file")
            texts = {"validation": whole.select(range(at)), "train": whole.select(range(at, len(whole)))}
    for split in wanted - set(texts):
        if split not in given:
            raise ConfigError(f"{data.dataset_name} has no {split} split; it has {', '.join(sorted(given))}")
        texts[split] = _load(source, split, model, streaming=data.streaming)
    return texts


def tokenize(texts: Any, split: str, tokenizer: Any, data: DataArguments, training: MNTPTrainingArguments) -> Any:
    """Texts of one split -> a data set of `input_ids`: a line each, or chunks of max_seq_length tokens.

    Raises:
        ConfigError: there is no text in it, or not enough for one chunk.
    """
    length = sequence_length(tokenizer, data)
    source = data.dataset_name or getattr(data, f"{split}_file") or data.train_file
    first = next(iter(texts), None)
    if first is None:
        raise ConfigError(f"there is no text for {split} in {source}")
    column = "text" if "text" in first else next(iter(first))

    def lines(batch: dict[str, list]) -> dict[str, list]:
        sequences = ids(batch, truncation=True, max_length=length)
        return {"input_ids": [s for s in sequences if len(s) > 1]}  # the first token is never predicted

    def chunks(batch: dict[str, list]) -> dict[str, list]:
        line = list(chain.from_iterable(ids(batch)))
        return {"input_ids": [line[i : i + length] for i in range(0, len(line) - length + 1, length)]}

    def ids(batch: dict[str, list], **how: Any) -> list[list[int]]:
        wrong = next((text for text in batch[column] if not isinstance(text, (str, type(None)))), None)
        if wrong is not None:
            raise ConfigError(f"{source} has no column of text: {column!r} holds {type(wrong).__name__} {str(wrong)[:40]!r}")
        kept = [text for text in batch[column] if text and not text.isspace()]
        return tokenizer(kept, return_attention_mask=False, verbose=False, **how)["input_ids"] if kept else []

    how: dict[str, Any] = {"batched": True, "remove_columns": list(first)}
    if not data.streaming:
        how |= {"num_proc": data.preprocessing_num_workers, "load_from_cache_file": not data.overwrite_cache}
        how["desc"] = f"Tokenizing {split}"
    with training.main_process_first(desc="tokenizing"):
        sequences = texts.map(lines if data.line_by_line else chunks, **how)
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    if limit is not None:
        sequences = sequences.take(limit) if data.streaming else sequences.select(range(min(limit, len(sequences))))
    if next(iter(sequences), None) is None:
        short = f"less than one chunk of max_seq_length={length} tokens"
        lacking = "no line of two tokens or more" if data.line_by_line else short
        raise ConfigError(f"the text for {split} in {source} holds {lacking}")
    return Endless(sequences) if data.streaming and split == "train" else sequences


class Endless(IterableDataset):
    """A stream that starts over at its end: one epoch without an end, in which any step can be found again."""

    def __init__(self, sequences: Any) -> None:
        self.sequences = sequences

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            for sequence in self.sequences:
                yield {**sequence, PASS: number}


def sequence_length(tokenizer: Any, data: DataArguments) -> int:
    """Tokens a sequence at most."""
    return min(data.max_seq_length or LONGEST, tokenizer.model_max_length)


def _reader(files: dict[str, str]) -> str:
    for path in files.values():
        if not os.path.isfile(path):
            raise ConfigError(f"no such file: {path}")
        if not os.path.getsize(path):
            raise ConfigError(f"there is no text in {path}: the file is empty")
    endings = {os.path.splitext(path)[1][1:].lower() for path in files.values()}
    readers = {READERS.get(ending, "") for ending in endings}
    if len(readers) != 1 or "" in readers:
        raise ConfigError(
            f"files must end in {', '.join('.' + ending for ending in READERS)}, and both alike; got "
            f"{' and '.join(files.values())}"
        )
    return readers.pop()


def _splits(source: dict[str, Any], model: ModelArguments) -> set[str]:
    return set(_guarded(source, datasets.get_dataset_split_names, source["path"], source["name"], token=model.token))


def _load(source: dict[str, Any], split: str, model: ModelArguments, streaming: bool = False) -> Any:
    how = {"split": split, "cache_dir": model.cache_dir, "token": model.token, "streaming": streaming}
    return _guarded(source, datasets.load_dataset, **source, **how)


def _guarded(source: dict[str, Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # dozens of kinds come out of `datasets` and the hub; all of them mean this
        what = " and ".join(source["data_files"].values()) if "data_files" in source else source["path"]
        raise ConfigError(f"can't read {what}: {one_line(error.__cause__ or error)}") from error


def _hold_out_of_stream(train: Any, data: DataArguments) -> dict[str, Any]:
    if data.max_eval_samples is None:
        raise ConfigError(
            "a stream has no percentage to hold out for do_eval: give validation_file, or max_eval_samples to take "
            "that many texts off its beginning"
        )
    return {"validation": train.take(data.max_eval_samples), "train": train.skip(data.max_eval_samples)}
