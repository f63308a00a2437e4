"""What a data set hands to a collator, read into NumPy arrays and checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import CollatorError

Row = dict[str, np.ndarray]  # one text: each of the keys that it has, (length,), int64
_KEYS = ("input_ids", "attention_mask", "special_tokens_mask", "position_ids")
_MASKS = {"attention_mask", "special_tokens_mask"}


def read_rows(features: Any) -> list[Row]:
    """All texts of a batch.

    Raises:
        CollatorError: `features` is not a list of texts, or a text is not made of integers.
    """
    if isinstance(features, (Mapping, str, bytes)):
        raise CollatorError(
            f"features must be a list with one feature per text; got one {type(features).__name__} for all. "
            'Give [{"input_ids": [...]}, {"input_ids": [...]}].'
        )
    try:
        listed = list(features)
    except TypeError as error:
        raise CollatorError(f"features must be a list with one feature per text; got {features!r}.") from error
    return [_read_row(feature, index) for index, feature in enumerate(listed)]


def join(rows: list[Row], key: str, lengths: np.ndarray, default: int | None) -> np.ndarray:
    """One key of all rows on one line, (total,). A row without it gets `default`, or counts from 0 if that is None."""
    return np.concatenate(
        [
            row[key] if key in row else np.arange(length) if default is None else np.full(length, default)
            for row, length in zip(rows, lengths)
        ]
    )


def without_padding(row: Row) -> Row:
    """The real tokens of a text alone, without an attention_mask."""
    if "attention_mask" not in row:
        return row
    real = row["attention_mask"] != 0
    return {key: value[real] for key, value in row.items() if key != "attention_mask"}


def _read_row(feature: Any, index: int) -> Row:
    if not isinstance(feature, Mapping):
        feature = {"input_ids": feature}
    if feature.get("input_ids") is None:
        held = [key for key, value in feature.items() if value is not None]
        raise CollatorError(f"Feature {index} has no input_ids, only {held}. Tokenize the texts first.")
    row: Row = {}
    for key in _KEYS:
        if feature.get(key) is None:
            continue
        row[key] = _read_integers(feature[key], f"{key} of feature {index}", "iub" if key in _MASKS else "iu")
        if len(row[key]) != len(row["input_ids"]):
            raise CollatorError(
                f"Feature {index} has {len(row['input_ids'])} input_ids and {len(row[key])} of {key}; they must match."
            )
    for key in _MASKS & row.keys():
        values = row[key]
        if values.size and (values.min() < 0 or values.max() > 1):
            raise CollatorError(
                f"{key} of feature {index} must hold 0 and 1 alone; got {values.min()} to {values.max()}. Give the documents of "
                "a packed row by position_ids that start again."
            )
    return row


def _read_integers(given: Any, what: str, kinds: str) -> np.ndarray:
    """(length,), int64. kinds: the NumPy kinds of dtype that are taken."""
    try:
        value = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CollatorError(f"{what} can't be read as numbers: {error}.") from error
    if value.ndim != 1 or (value.size and value.dtype.kind not in kinds):
        raise CollatorError(
            f"{what} must be a row of integers, shape (length,); got shape {value.shape}, {value.dtype}."
        )
    if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
        raise CollatorError(f"{what} must fit in int64; got {value.max()}.")
    return value.astype(np.int64, copy=False)
