"""A tokenizer that puts one more token before every text, or after it, once it is saved and opened again too."""

from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokenizers.processors import Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError

Place = Literal["first", "last"]

# Flags of some classes of tokenizers, from which transformers makes their post-processor anew whenever they open.
_FLAGS = {"first": ("add_bos_token", "bos_token"), "last": ("add_eos_token", "eos_token")}


def adds(tokenizer: Any, token: str, place: Place) -> bool:
    """Whether a tokenizer puts `token` at this place of every text."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    end = ids[:1] if place == "first" else ids[-1:]
    return len(ids) > len(plain) and end == [tokenizer.convert_tokens_to_ids(token)]


def add_token(tokenizer: Any, token: str, place: Place, needed_by: str) -> Any:
    """Let a tokenizer put a token before every text, or after it. A text that is cut keeps it.

    Args:
        tokenizer: The tokenizer. It is changed, unless it adds the token already.
        token: A token of its vocabulary.
        place: Before what the tokenizer puts before a text by itself, or after what it puts after it.
        needed_by: The setting that asks for it, for the message.

    Returns:
        The tokenizer; or one of transformers' general class with all that is in it, where its own class would lose the token
        when it opens.

    Raises:
        ConfigError: It is not of the tokenizers library.
    """
    if adds(tokenizer, token, place):
        return tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(f"{needed_by} needs a tokenizer of the tokenizers library")
    flag, name = _FLAGS[place]
    has_flags = any(one in tokenizer.init_kwargs for one, _ in _FLAGS.values())
    if has_flags and token == getattr(tokenizer, name):
        setattr(tokenizer, flag, True)
        tokenizer.init_kwargs[flag] = True  # so that it is saved
    if not adds(tokenizer, token, place):
        _extend(tokenizer, token, place)
    return tokenizer if _keeps(tokenizer, token, place) else of_general_class(tokenizer)


def of_general_class(tokenizer: Any) -> Any:
    """The same tokenizer as a PreTrainedTokenizerFast, which opens as its file says.

    A tokenizer of a class of its own may make its normalizer or its post-processor anew when it opens.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _extend(tokenizer: Any, token: str, place: Place) -> None:
    """Add the token in the post-processor, after all that this does."""
    if place == "first":
        single, pair = [token, "$A"], [token, "$A", "$B:1"]
    else:
        single, pair = ["$A", token], ["$A", "$B:1", f"{token}:1"]
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    template = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    backend = tokenizer.backend_tokenizer
    earlier = backend.post_processor
    backend.post_processor = template if earlier is None else Sequence([earlier, template])


def _keeps(tokenizer: Any, token: str, place: Place) -> bool:
    """Whether the token is still added by what its class opens from a folder."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return adds(type(tokenizer).from_pretrained(folder), token, place)
