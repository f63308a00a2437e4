"""A tokenizer that appends its end token, for pooling by the end token."""

from typing import Any

from ...errors import ConfigError
from ..added_token import add_token


def append_end_token(tokenizer: Any) -> Any:
    """Let a tokenizer append its end token to every text. The saved tokenizer does so too.

    LLM2Vec appends the token to the text instead. Here a text that is cut keeps it.

    Returns:
        The tokenizer, which is changed; another object where its own class would lose the token when it opens.

    Raises:
        ConfigError: The tokenizer has no end token, or is not of the tokenizers library.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("pooling_mode=eos_token needs a tokenizer with an end token")
    return add_token(tokenizer, tokenizer.eos_token, "last", "pooling_mode=eos_token")
