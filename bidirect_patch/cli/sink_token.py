"""The sink token of the commands: which token stands before each text, and a tokenizer that puts it there."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from ..checkpoints.marks import HUB_OPTIONS, read_json
from ..errors import ConfigError
from .added_token import add_token
from .load_errors import loading

NAMES = ("bos", "eos")  # of a tokenizer's beginning and end token, in a setting


def candidates(tokenizer: Any) -> list[str]:
    """The tokens that can be put before each text, the one that is taken by default first.

    Args:
        tokenizer: Any transformers tokenizer.

    Returns:
        What the tokenizer puts before each text by itself, and nothing else, if it does so. Otherwise its beginning token, its
        end token, and its other special tokens that have a name, each once. Empty for a tokenizer without special tokens.
    """
    own = first_token(tokenizer)
    if own is not None:
        return [own]
    named = [tokenizer.bos_token, tokenizer.eos_token, *tokenizer.special_tokens_map.values()]
    vocabulary = tokenizer.get_vocab()
    return list(dict.fromkeys(token for token in named if isinstance(token, str) and token in vocabulary))


def first_token(tokenizer: Any) -> str | None:
    """The token that a tokenizer puts before each text by itself, or None."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if len(ids) <= len(plain) or ids[:1] == plain[:1]:
        return None
    token: str = tokenizer.convert_ids_to_tokens(ids[0])
    return token


def token_before(tokenizer: Any, folders: Sequence[str], **options: Any) -> str | None:
    """The token behind which texts stood in the step before.

    Args:
        tokenizer: That of the texts.
        folders: Folders or hub names of adapters and the like. The last one with a tokenizer counts.
        **options: Arguments of the tokenizer's `from_pretrained`.

    Returns:
        The token; None if there was none, or if `tokenizer` puts it there by itself.

    Raises:
        ConfigError: A tokenizer can't be loaded.
    """
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    folder = next((each for each in reversed(folders) if read_json(each, "tokenizer_config.json", hub)), None)
    if folder is None:
        return None
    with loading(repr(folder)):
        token = first_token(AutoTokenizer.from_pretrained(folder, **options))
    return None if token == first_token(tokenizer) else token


def choose_sink_token(tokenizer: Any, asked: str | None) -> str:
    """The token that is put before each text.

    Args:
        tokenizer: The tokenizer of the texts.
        asked: "bos", "eos" or a token of the vocabulary. None is the default: what the tokenizer adds by itself, else its
            beginning token, else its end token.

    Raises:
        ConfigError: The tokenizer has no such token.
    """
    if asked is None:
        token = first_token(tokenizer) or tokenizer.bos_token or tokenizer.eos_token
        if token is None:
            raise ConfigError(
                "num_sink_tokens needs a token to put before each text, and the tokenizer has neither a beginning nor an end "
                "token: give sink_token, a token of its vocabulary"
            )
        return str(token)
    token = getattr(tokenizer, f"{asked}_token") if asked in NAMES else asked
    if token is None:
        raise ConfigError(f"sink_token={asked}: the tokenizer has no {'beginning' if asked == 'bos' else 'end'} token")
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"sink_token={asked}: this is no token of the tokenizer's vocabulary; give bos, eos or one of those")
    return str(token)


def with_sink_token(tokenizer: Any, asked: str | None, num_sink_tokens: int) -> tuple[Any, str | None]:
    """A tokenizer that puts the token before each text that the settings ask for, and the token.

    Args:
        tokenizer: The tokenizer. It may be changed.
        asked: "bos", "eos" or a token of the vocabulary; None takes the default.
        num_sink_tokens: Without sink tokens, and without a token that is asked for, the tokenizer stays as it is.

    Raises:
        ConfigError: The tokenizer has no such token, or can't be changed.
    """
    if asked is None and not num_sink_tokens:
        return tokenizer, None
    token = choose_sink_token(tokenizer, asked)
    return prepend_sink_token(tokenizer, token), token


def prepend_sink_token(tokenizer: Any, token: str) -> Any:
    """Let a tokenizer put `token` before every text. The saved tokenizer does so too.

    Args:
        tokenizer: The tokenizer. It is changed, unless it puts the token there already. What else it puts before a text stays,
            after the token.
        token: A token of its vocabulary, such as one of `candidates`.

    Returns:
        The tokenizer to use and to save from now on; another object where its own class would lose the token.

    Raises:
        ConfigError: The tokenizer is not of the tokenizers library.
    """
    return add_token(tokenizer, token, "first", f"sink_token={token}")
