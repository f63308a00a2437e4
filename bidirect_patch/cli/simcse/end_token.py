"""A tokenizer that appends its end token, for pooling by the end token."""

from typing import Any

from tokenizers.processors import Sequence, TemplateProcessing

from ...errors import ConfigError


def append_end_token(tokenizer: Any) -> None:
    """Let a tokenizer append its end token to every text, in place. The saved tokenizer does so too.

    LLM2Vec appends the token to the text instead. Here a text that is cut keeps it.

    Raises:
        ConfigError: The tokenizer has no end token, or is not of the tokenizers library.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("pooling_mode=eos_token needs a tokenizer with an end token")
    if _appends(tokenizer):
        return
    if not tokenizer.is_fast:
        raise ConfigError("pooling_mode=eos_token needs a tokenizer of the tokenizers library")
    if not tokenizer.init_kwargs.keys().isdisjoint(("add_bos_token", "add_eos_token")):
        # transformers makes the post-processor of such a tokenizer anew, from these flags, when it opens.
        tokenizer.add_eos_token = True
        tokenizer.init_kwargs["add_eos_token"] = True  # so that it is saved
    if not _appends(tokenizer):
        backend = tokenizer.backend_tokenizer
        end = tokenizer.eos_token
        template = TemplateProcessing(
            single=["$A", end], pair=["$A", "$B:1", f"{end}:1"], special_tokens=[(end, tokenizer.eos_token_id)]
        )
        earlier = backend.post_processor
        backend.post_processor = template if earlier is None else Sequence([earlier, template])


def _appends(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
