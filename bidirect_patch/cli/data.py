"""Texts from files or the hub, as sequences of token ids."""

import os
from itertools import chain
from typing import Any

import datasets

from ..errors import ConfigError
from . import one_line
from .arguments import DataArguments, MNTPTrainingArguments, ModelArguments

READERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv"}  # file ending -> builder of `datasets`
LONGEST = 1024  # tokens a sequence where neither the settings nor the tokenizer say less


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
            share = data.validation_split_percentage
            texts["validation"] = _load(source, f"train[:{share}%]", model)
            texts["train"] = _load(source, f"train[{share}%:]", model)
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
    first = next(iter(texts), None)
    source = data.dataset_name or getattr(data, f"{split}_file") or data.train_file
    if first is None:
        raise ConfigError(f"there is no text for {split} in {source}, or too little to hold out a share of it")
    column = "text" if "text" in first else next(iter(first))
    if not isinstance(first[column], str):
        raise ConfigError(f"{source} has no column of text: {column!r} holds {type(first[column]).__name__}")

    def lines(batch: dict[str, list]) -> dict[str, list]:
        kept = [text for text in batch[column] if text and not text.isspace()]
        return _ids(kept, truncation=True, max_length=length) if kept else {"input_ids": []}

    def chunks(batch: dict[str, list]) -> dict[str, list]:
        line = list(chain.from_iterable(_ids([text or "" for text in batch[column]])["input_ids"]))
        return {"input_ids": [line[i : i + length] for i in range(0, len(line) - length + 1, length)]}

    def _ids(kept: list[str], **how: Any) -> dict[str, list]:
        return {"input_ids": tokenizer(kept, return_attention_mask=False, verbose=False, **how)["input_ids"]}

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
        lacking = "only blank lines" if data.line_by_line else f"less than one chunk of max_seq_length={length} tokens"
        raise ConfigError(f"the text for {split} in {source} holds {lacking}")
    return sequences


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
