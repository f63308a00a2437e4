"""Sentences as token ids, with the word that is read at each token."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..sink_token import first_token
from .data import Sentence

IGNORED = -100  # the label of a word that is not scored, as in transformers
NO_WORD = -1  # at a token where no word is read

logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """Where the label of a word is read.

    Attributes:
        next_token: At the token before each of its own, as after masked next token prediction; else at its own tokens.
        merge: From the mean over its tokens; else at the first one.
    """

    next_token: bool = False
    merge: bool = False

    @property
    def in_words(self) -> str:
        """As settings."""
        return f"retroactive_labels={'next_token' if self.next_token else 'same_token'}, merge_subwords={str(self.merge).lower()}"


def check_reading(reading: Reading, tokenizer: Any, num_sink_tokens: int) -> None:
    """Check that the label of a sentence's first word can be read.

    Raises:
        ConfigError: There is no token before it, or one that sees no text.
    """
    if not reading.next_token:
        return
    if num_sink_tokens:
        raise ConfigError(
            "retroactive_labels=next_token reads the first word's label at the token before it, and a sink token there sees no "
            "text: give same_token, or num_sink_tokens 0"
        )
    if first_token(tokenizer) is None:
        raise ConfigError(
            "retroactive_labels=next_token reads the first word's label at the token before it, and this tokenizer puts none "
            "there: give sink_token (bos, eos or a token), or same_token"
        )


def encode(
    sentences: Sequence[Sentence], tokenizer: Any, labels: Sequence[str], length: int, reading: Reading, split: str
) -> list[dict[str, Any]]:
    """Turn sentences into token ids.

    The words are read as a text, with a space between two, as transformers' pipelines read it.

    Args:
        sentences: The sentences.
        tokenizer: A tokenizer of the tokenizers library.
        labels: The labels that the classifier tells apart. A label that is not among them gets a number after them.
        length: Tokens of a sentence; what is beyond is cut, and words that have lost their tokens are not scored.
        reading: Where the label of a word is read.
        split: What the sentences are for, for the messages.

    Returns:
        For each sentence `input_ids` and `word_ids`, (tokens,), the number of the word that is read at a token or -1; and
        `labels`, (words,), -100 where nothing is scored; and `sentence`, its place. Sentences in which nothing is scored are left
        out.

    Raises:
        ConfigError: No word is left.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    rows = []
    lost = 0
    for place, sentence in enumerate(sentences):
        encoded = tokenizer(" ".join(sentence.words), truncation=True, max_length=length, return_offsets_mapping=True)
        words = words_of_tokens(sentence.words, encoded["offset_mapping"], encoded.sequence_ids(0))
        if reading.next_token:
            words = [*words[1:], NO_WORD]
        there = set(words)
        wanted = [
            numbers.setdefault(label, len(numbers)) if label is not None else IGNORED for label in sentence.labels
        ]
        scored = [label if number in there else IGNORED for number, label in enumerate(wanted)]
        lost += sum(label != IGNORED for label in wanted) - sum(label != IGNORED for label in scored)
        if any(label != IGNORED for label in scored):
            rows.append({"input_ids": encoded["input_ids"], "word_ids": words, "labels": scored, "sentence": place})
    unknown = list(numbers)[len(labels) :]
    if unknown:
        names = ", ".join(unknown)
        logger.warning(
            "the classifier has no label %s, which words of the %s data have: these count as errors", names, split
        )
    if lost:
        why = f"they are beyond max_seq_length={length}, or give no token"
        logger.warning("%d words of the %s data are not scored: %s", lost, split, why)
    if not rows:
        raise ConfigError(f"no word of the {split} data is within max_seq_length={length}")
    return rows


def words_of_tokens(
    words: Sequence[str], offsets: Sequence[tuple[int, int]], sequences: Sequence[int | None]
) -> list[int]:
    """The number of the word that each token of a sentence belongs to.

    Args:
        words: The words, which are joined by spaces.
        offsets: Where each token begins and ends in the joined text.
        sequences: None for a token that is not of the text.

    Returns:
        (tokens,). A token of nothing but the space before a word belongs to that word; -1 for one of no word.
    """
    of_characters: list[int] = []  # and of the space before a word, that word
    for number, word in enumerate(words):
        of_characters += [number] * (len(word) + (number > 0))
    found = []
    for (start, _), sequence in zip(offsets, sequences):
        is_text = sequence is not None and start < len(of_characters)
        found.append(of_characters[start] if is_text else NO_WORD)
    return found
