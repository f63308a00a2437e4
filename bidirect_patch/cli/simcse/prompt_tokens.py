"""A tokenizer with which sentence-transformers counts the tokens of a prompt as they are before a text."""

from collections.abc import Iterable
from typing import Any

from tokenizers.normalizers import Sequence, Strip
from transformers import PreTrainedTokenizerFast

from ...errors import ConfigError
from ..added_token import of_general_class


def with_countable_prompts(tokenizer: Any, prompts: Iterable[str]) -> Any:
    """Return a tokenizer in which each prompt alone has the tokens that it has before a text.

    sentence-transformers leaves as many tokens out of pooling as the prompt has alone. There the space at its end is a
    token, which before a text is a part of the first word: this word would be left out too. So the tokenizer drops
    whitespace at the end of what it is given.

    Args:
        tokenizer: The tokenizer. It is changed.
        prompts: The prompts, each with its space at the end.

    Raises:
        ConfigError: The tokenizer is not of the tokenizers library.
    """
    if all(_is_prefix(tokenizer, prompt) for prompt in prompts):
        return tokenizer
    if not tokenizer.is_fast:
        raise ConfigError("instructions need a tokenizer of the tokenizers library")
    backend = tokenizer.backend_tokenizer
    strip = Strip(left=False, right=True)
    backend.normalizer = strip if backend.normalizer is None else Sequence([strip, backend.normalizer])
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    return of_general_class(tokenizer)


def _is_prefix(tokenizer: Any, prompt: str) -> bool:
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return bool(tokenizer(f"{prompt}a", add_special_tokens=False)["input_ids"][: len(alone)] == alone)
