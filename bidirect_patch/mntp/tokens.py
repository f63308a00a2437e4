"""What the collator reads of a tokenizer. Not every tokenizer has each attribute, and some raise where others answer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CollatorError, MaskTokenError


def check_tokenizer(tokenizer: Any) -> None:
    """Raise CollatorError if `tokenizer` lacks what the collator can't do without."""
    has_methods = callable(getattr(tokenizer, "convert_tokens_to_ids", None)) and hasattr(tokenizer, "__len__")
    if isinstance(tokenizer, type) or not has_methods:
        what = repr(tokenizer) if isinstance(tokenizer, (str, type)) else type(tokenizer).__name__
        raise CollatorError(f"tokenizer must be a transformers tokenizer; got {what}. Load it and pass the object.")


def find_mask_token_id(tokenizer: Any, mask_token: str | None = None) -> int:
    """The one id of `mask_token`; by default that of the tokenizer's own mask token, else that of `_`.

    A vocabulary entry of exactly that spelling is taken first, as in LLM2Vec (https://arxiv.org/abs/2404.05961). If there is
    none, the string is encoded.

    Raises:
        MaskTokenError: the mask token is several ids, or none.
    """
    if mask_token is None:
        own = getattr(tokenizer, "mask_token", None)
        mask_token = "_" if own is None else own
    if not isinstance(mask_token, str) or not mask_token:
        raise MaskTokenError(f"mask_token must be a non-empty string; got {mask_token!r}.")
    is_unknown = mask_token == getattr(tokenizer, "unk_token", None)
    unknown = None if is_unknown else getattr(tokenizer, "unk_token_id", None)
    token_id = tokenizer.convert_tokens_to_ids(mask_token)
    if token_id is not None and token_id != unknown:
        return token_id
    ids = [i for i in tokenizer.encode(mask_token, add_special_tokens=False) if i != unknown]
    if len(ids) != 1:
        raise MaskTokenError(
            f"The mask token must be exactly one id of the tokenizer; {mask_token!r} gives {len(ids)}"
            f"{f' ({ids})' if ids else ''}. Give a mask token that is in its vocabulary."
        )
    return ids[0]


def special_ids(tokenizer: Any) -> np.ndarray:
    """The ids of all special tokens, sorted, int64, (n,).

    Some special tokens have no name in the tokenizer, such as Llama-3's <|eot_id|>.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    # MistralCommonBackend has a method of that name, which only raises.
    tokens = added.items() if isinstance(added, Mapping) else ()
    unnamed = {i for i, token in tokens if getattr(token, "special", False)}
    return np.array(sorted({*getattr(tokenizer, "all_special_ids", ()), *unnamed}), dtype=np.int64)


def pad_token_id(tokenizer: Any) -> int:
    """An id to fill padding with. Any id that the embedding has will do, since attention_mask is 0 there."""
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return token_id
    return 0


def largest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer has. In some vocabularies it is larger than the number of entries."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(len(tokenizer) - 1, max(vocabulary.values(), default=0), *special_ids(tokenizer).tolist())
