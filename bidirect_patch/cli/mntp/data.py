"""Texts from files or from the hub, as sequences of token ids."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import datasets
import numpy as np

from ...errors import ConfigError
from ...mntp.tokens import special_ids
from ..datafiles import columns_of_text, find_files, reader_of_all, reading
from .epochs import CountedSequences, EndlessStream
from .settings import DataArguments, MNTPTrainingArguments, ModelArguments

Split = Literal["train", "validation"]
Batch = dict[str, list[Any]]  # the columns of some examples

@dataclass(frozen=True)
class Beginning:
    """What each sequence begins with.

    Attributes:
        token_id: The token that the tokenizer puts before each text, and that stands before each piece of a longer text too.
            None: a long text is cut as it is.
        unpredicted: How many tokens are never predicted: the first one, or all sink tokens.
    """

    token_id: int | None = None
    unpredicted: int = 1


PLAIN = Beginning()
BEGINNING_OF_STREAM = 1000  # sequences
LONGEST = 1024  # tokens per sequence, where neither the settings nor the tokenizer have a lower limit


def load_sequences(
    tokenizer: Any,
    model: ModelArguments,
    data: DataArguments,
    training: MNTPTrainingArguments,
    beginning: Beginning = PLAIN,
) -> dict[Split, Any]:
    """Load and tokenize the texts to train and to evaluate on.

    Returns:
        Data sets of `input_ids`: `train` with `do_train`, `validation` with `do_eval`.

    Raises:
        ConfigError: The texts cannot be read, or there are not enough of them.
    """
    texts = load_texts(model, data, training)
    return {split: tokenize(texts[split], split, tokenizer, data, training, beginning) for split in _splits_in_use(training)}


def load_texts(model: ModelArguments, data: DataArguments, training: MNTPTrainingArguments) -> dict[Split, Any]:
    """Load the texts: `train` with `do_train`, `validation` with `do_eval`.

    Where no texts for validation are given, they are held out of those for training.

    Raises:
        ConfigError: A file or a data set cannot be read, or it lacks a split.
    """
    sources = _sources(model, data)
    texts: dict[Split, Any] = {}
    if training.do_eval and "validation" not in sources and "train" in sources:
        hold_out = _hold_out_of_stream if data.streaming else _hold_out
        texts = hold_out(_load(sources["train"], model, streaming=data.streaming), data)
    for split in _splits_in_use(training):
        if split in texts:
            continue
        if split not in sources:
            raise ConfigError(f"{data.dataset_name} has no {split} split; it has {', '.join(sorted(sources))}")
        texts[split] = _load(sources[split], model, streaming=data.streaming)
    return texts


def tokenize(
    texts: Any,
    split: Split,
    tokenizer: Any,
    data: DataArguments,
    training: MNTPTrainingArguments,
    beginning: Beginning = PLAIN,
) -> Any:
    """Turn the texts of one split into sequences: one for each line, or chunks of `max_seq_length` tokens.

    Returns:
        A data set of `input_ids`. A sequence to train on says which pass over the texts it belongs to, and a stream to
        train on starts over at its end.

    Raises:
        ConfigError: There is no text, or not enough for one sequence, or it can't be told which column holds it.
    """
    length = sequence_length(tokenizer, data)
    source = data.dataset_name or " and ".join(getattr(data, f"{split}_file") or data.train_file or ())
    first = next(iter(texts), None)
    if first is None:
        raise ConfigError(f"there is no text for {split} in {source}")
    to_ids = _tokenizing(tokenizer, "text" if "text" in first else _only_column(texts, source), source)
    options: dict[str, Any] = {"batched": True, "remove_columns": list(first)}
    if not data.streaming:
        options |= {"num_proc": data.preprocessing_num_workers, "load_from_cache_file": not data.overwrite_cache}
        options["desc"] = f"Tokenizing {split}"
    with training.main_process_first(desc="tokenizing"):
        cut = _lines(to_ids, length, beginning.unpredicted)
        if not data.line_by_line:
            cut = _chunks(to_ids, length) if beginning.token_id is None else _pieces(to_ids, length, beginning.token_id)
        sequences = texts.map(cut, **options)
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    if limit is not None:
        sequences = sequences.take(limit) if data.streaming else sequences.select(range(min(limit, len(sequences))))
    if next(iter(sequences), None) is None:
        too_short = f"less than one chunk of max_seq_length={length} tokens"
        least = "two" if beginning.unpredicted == 1 else beginning.unpredicted + 1
        lacking = f"no line of {least} tokens or more" if data.line_by_line else too_short
        raise ConfigError(f"the text for {split} in {source} holds {lacking}")
    if not _holds_ordinary_token(sequences, tokenizer, data.streaming, beginning.unpredicted):
        raise ConfigError(
            f"the text for {split} in {source} holds nothing to predict: its tokens are special, or unknown to the tokenizer"
        )
    if split == "validation":
        return sequences
    return EndlessStream(sequences) if data.streaming else CountedSequences(sequences)


def sequence_length(tokenizer: Any, data: DataArguments) -> int:
    """Return the largest number of tokens per sequence."""
    return min(data.max_seq_length or LONGEST, tokenizer.model_max_length)


def _only_column(texts: Any, source: str) -> str:
    """Return the only column that holds text. Of a stream that doesn't know its columns the beginning is read."""
    features = texts.features
    if features is None:
        with reading(source):
            features = datasets.Dataset.from_list(list(islice(texts, BEGINNING_OF_STREAM))).features
    columns = columns_of_text(features)
    if list(columns.values()) == ["text"]:
        return next(iter(columns))
    found = f"{len(columns)} columns of text" if columns else "no column of text, but"
    raise ConfigError(f"{source} has {found} ({', '.join(columns or features)}): rename the one to train on to text")


def _holds_ordinary_token(sequences: Any, tokenizer: Any, streaming: bool, unpredicted: int) -> bool:
    """Say whether a token of some sequence can be predicted. Only the beginning of a stream is read."""
    special = special_ids(tokenizer)
    read = islice(sequences, BEGINNING_OF_STREAM) if streaming else sequences
    return any(not np.isin(sequence["input_ids"][unpredicted:], special).all() for sequence in read)


def _splits_in_use(training: MNTPTrainingArguments) -> list[Split]:
    splits: list[Split] = []
    if training.do_train:
        splits.append("train")
    if training.do_eval:
        splits.append("validation")
    return splits


# `datasets` hashes the functions that it maps, to find them in its cache. It hashes the code of nested functions alone.


def _tokenizing(tokenizer: Any, column: str, source: str) -> Callable[..., list[list[int]]]:
    tokenizer = deepcopy(tokenizer)  # a fast tokenizer keeps the length of its last call, and it is saved with the model

    def to_ids(batch: Batch, **options: Any) -> list[list[int]]:
        wrong = next((text for text in batch[column] if not isinstance(text, (str, type(None)))), None)
        if wrong is not None:
            raise ConfigError(
                f"{source} has no column of text: {column!r} holds {type(wrong).__name__} {str(wrong)[:40]!r}"
            )
        kept = [text for text in batch[column] if text and not text.isspace()]
        return tokenizer(kept, return_attention_mask=False, verbose=False, **options)["input_ids"] if kept else []

    return to_ids


def _lines(to_ids: Callable[..., list[list[int]]], length: int, unpredicted: int) -> Callable[[Batch], Batch]:
    def lines(batch: Batch) -> Batch:
        sequences = to_ids(batch, truncation=True, max_length=length)
        return {"input_ids": [s for s in sequences if len(s) > unpredicted]}

    return lines


def _chunks(to_ids: Callable[..., list[list[int]]], length: int) -> Callable[[Batch], Batch]:
    def chunks(batch: Batch) -> Batch:
        line = list(chain.from_iterable(to_ids(batch)))
        return {"input_ids": [line[i : i + length] for i in range(0, len(line) - length + 1, length)]}

    return chunks


def _pieces(to_ids: Callable[..., list[list[int]]], length: int, token_id: int) -> Callable[[Batch], Batch]:
    """As `_chunks`, with the token before each piece, and not before each text within one."""

    def pieces(batch: Batch) -> Batch:
        line = list(chain.from_iterable(ids[1:] for ids in to_ids(batch)))
        own = length - 1
        return {"input_ids": [[token_id, *line[i : i + own]] for i in range(0, len(line) - own + 1, own)]}

    return pieces


def _sources(model: ModelArguments, data: DataArguments) -> dict[str, dict[str, Any]]:
    """Return the arguments of `load_dataset` for each split that is given."""
    if data.dataset_name:
        with reading(data.dataset_name):
            splits = datasets.get_dataset_split_names(data.dataset_name, data.dataset_config_name, token=model.token)
        source = {"path": data.dataset_name, "name": data.dataset_config_name}
        return {split: {**source, "split": split} for split in splits}
    sources = {}
    for split, paths in (("train", data.train_file), ("validation", data.validation_file)):
        if paths:
            files = find_files(paths)
            sources[split] = {"path": reader_of_all(files), "data_files": {split: files}, "split": split}
    return sources


def _load(source: dict[str, Any], model: ModelArguments, streaming: bool = False) -> Any:
    files = source.get("data_files", {}).get(source["split"])
    with reading(" and ".join(files) if files else source["path"]):
        return datasets.load_dataset(**source, cache_dir=model.cache_dir, token=model.token, streaming=streaming)


def _hold_out(train: Any, data: DataArguments) -> dict[Split, Any]:
    end = round(len(train) * data.validation_split_percentage / 100)
    if end in (0, len(train)):
        share = f"validation_split_percentage={data.validation_split_percentage}"
        raise ConfigError(f"too few texts ({len(train)}) to hold out {share} of them for do_eval: give validation_file")
    return {"validation": train.select(range(end)), "train": train.select(range(end, len(train)))}


def _hold_out_of_stream(train: Any, data: DataArguments) -> dict[Split, Any]:
    if data.max_eval_samples is None:
        raise ConfigError(
            "a stream has no percentage to hold out for do_eval: give validation_file, or max_eval_samples to take "
            "that many texts off its beginning"
        )
    return {"validation": train.take(data.max_eval_samples), "train": train.skip(data.max_eval_samples)}
