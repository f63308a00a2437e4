"""Pairs of texts as token ids, each text once."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import ConfigError
from ..pairs import PAIR_COLUMNS
from ..sink_token import prepend_sink_token

LONGEST = 1024  # tokens of a text
BATCH_TOKENS = 2048
SHORTEST = 0.8  # of the longest text of its batch: the rest would be padding


class Pairs(NamedTuple):
    """Pairs of texts with scores.

    Attributes:
        texts: Each text once.
        first: Where the first text of each pair is among them, (pairs,), int64.
        second: The same for the second one.
        scores: (pairs,), float64.
    """

    texts: Sequence[str]
    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, data: Any) -> "Pairs":
        """The pairs of a data set with the columns `sentence1`, `sentence2` and `score`."""
        places: dict[str, int] = {}
        first, second = (np.array([places.setdefault(text, len(places)) for text in data[name]]) for name in PAIR_COLUMNS[:2])
        return cls(list(places), first, second, np.array(data[PAIR_COLUMNS[2]], dtype=np.float64))

    def some(self, count: int) -> np.ndarray:
        """The indices of so many pairs, (count,): the same ones whenever it is asked, spread over the file."""
        chosen: np.ndarray = np.sort(np.random.default_rng(0).permutation(len(self.scores))[:count])
        return chosen

    def texts_of(self, pairs: np.ndarray) -> np.ndarray:
        """The indices of the texts of some pairs, each once."""
        return np.unique(np.concatenate([self.first[pairs], self.second[pairs]]))


def with_first_token(tokenizer: Any, token: str | None) -> Any:
    """A copy of a tokenizer that puts a token before each text, and pads; with None one that only pads."""
    copy = deepcopy(tokenizer)  # a fast tokenizer keeps the length of its last call
    copy = copy if token is None else prepend_sink_token(copy, token)
    if copy.pad_token is None:
        copy.pad_token = copy.eos_token or copy.unk_token or copy.convert_ids_to_tokens(0)
    return copy


def token_ids(tokenizer: Any, texts: Sequence[str], limit: int | None) -> list[list[int]]:
    """The tokens of texts, as the tokenizer reads them by default. A text is cut at the limit, or at LONGEST tokens.

    Args:
        tokenizer: The tokenizer. If it is a fast one, it keeps the length.
        texts: The texts.
        limit: The number of positions that the model has, if it has such a limit.

    Raises:
        ConfigError: The tokenizer makes no token of a text.
    """
    length = min(LONGEST, tokenizer.model_max_length, limit or LONGEST)
    options = {"return_attention_mask": False, "verbose": False, "truncation": True, "max_length": length}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    for text, row in zip(texts, ids):
        if not row:
            raise ConfigError(f"the tokenizer makes no token of {text!r}")
    return ids


def batches(ids: Sequence[Sequence[int]], chosen: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Texts of about the same length together, the longest first.

    Args:
        ids: The tokens of all texts.
        chosen: Which texts are wanted.

    Yields:
        Which texts are in the batch; their tokens (texts, length), int64, padded on the right; and their mask, alike.
    """
    order = sorted(chosen, key=lambda i: -len(ids[i]))
    start = 0
    while start < len(order):
        longest = len(ids[order[start]])
        batch = [i for i in order[start : start + max(1, BATCH_TOKENS // longest)] if len(ids[i]) >= SHORTEST * longest]
        start += len(batch)
        rows = [torch.tensor(ids[i]) for i in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield batch, pad_sequence(rows, batch_first=True), mask
