"""The collator of the mntp command, whose masks can be repeated."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...mntp.collator import MNTPCollator, text_draws
from .data import sequence_length
from .epochs import PASS
from .settings import DataArguments, MNTPArguments
from .vocabulary import ADDED_MASK


class RepeatableCollator(MNTPCollator):
    """A collator whose masks of a text depend on nothing but the seed, the pass over the texts and the tokens of the text.

    Therefore a resumed run masks as an uninterrupted run does, whatever batches either of them had prepared ahead. Every
    evaluation scores the same tokens. Masks depend neither on the rest of the batch nor on the number of processes.
    """

    def __call__(self, features: Any) -> dict[str, Any]:
        """Make one batch, as MNTPCollator does. A text that says nothing of its pass is masked as in the first."""
        self._passes = [f.get(PASS, 0) if isinstance(f, Mapping) else 0 for f in features]
        return super().__call__(features)

    def draws(self, rows: list[dict[str, np.ndarray]]) -> torch.Tensor:
        """Draw as MNTPCollator does, but from a generator of its own for each text."""
        count = self.draws_per_token
        of_texts = [text_draws(row, self.seed or 0, n, count=count) for row, n in zip(rows, self._passes)]
        return torch.cat(of_texts, 1)


def make_collator(
    tokenizer: Any, data: DataArguments, mntp: MNTPArguments, *, padding_free: bool, seed: int, num_sink_tokens: int = 0
) -> RepeatableCollator:
    """Make a collator as the settings describe it.

    Args:
        tokenizer: The tokenizer of the texts.
        data: Decides how long sequences are and how they are padded.
        mntp: Decides what is masked and how.
        padding_free: Pack each batch into one row, whatever `data` says.
        seed: The seed of the masks.
        num_sink_tokens: How many tokens at the start of each sequence are never masked.

    Raises:
        MaskTokenError: The mask token is not exactly one id of the tokenizer.
    """
    mask_token = mntp.mask_token
    if mask_token is None and tokenizer.mask_token is None:
        mask_token = {"blank": "_", "eos": tokenizer.eos_token, "mask": ADDED_MASK}[mntp.mask_token_type]
    always = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    replacements: dict[str, Any] = always if mntp.data_collator_type == "all_mask" else {}
    shares = mntp.mlm_probability
    return RepeatableCollator(
        tokenizer,
        mlm_probability=shares if len(shares) > 1 else shares[0],
        mask_token=mask_token,
        pad_to_multiple_of=sequence_length(tokenizer, data) if data.pad_to_max_length else None,
        padding_free=padding_free,
        seed=seed,
        num_sink_tokens=num_sink_tokens,
        **replacements,
    )
