"""Pads sentences of tokens and labels of words into batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .tokens import IGNORED, NO_WORD


class WordCollator:
    """Pads sentences on the right.

    Args:
        padding_id: The token id of padding.
    """

    def __init__(self, padding_id: int) -> None:
        self.padding = {"input_ids": padding_id, "attention_mask": 0, "word_ids": NO_WORD, "labels": IGNORED}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch.

        Args:
            rows: What `tokens.encode` returns.

        Returns:
            `input_ids`, `attention_mask` and `word_ids`, (sentences, tokens); `labels`, (sentences, words). All int64.
        """
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
            for name, value in self.padding.items()
        }
