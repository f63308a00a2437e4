"""Tokens that the model has no row for: a mask token that is added, and tokens that the tokenizer brings."""

from typing import Any

from transformers import PreTrainedModel

from ...mntp.tokens import largest_id
from .settings import MNTPArguments

ADDED_MASK = "<mask>"


def add_mask_token(tokenizer: Any, mntp: MNTPArguments) -> list[int]:
    """Give a tokenizer without a mask token the token `<mask>`, in place, if `mask_token_type` is "mask".

    Returns:
        The id of the token, if the vocabulary lacked it.
    """
    if mntp.mask_token_type != "mask" or mntp.mask_token is not None or tokenizer.mask_token is not None:
        return []
    is_new = ADDED_MASK not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": ADDED_MASK})
    return [tokenizer.mask_token_id] if is_new else []


def add_rows(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Give a model as many embeddings as its tokenizer has ids, in place, if it has fewer.

    Returns:
        The ids of the new rows.
    """
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 this process may hold no part of it
    needed = largest_id(tokenizer) + 1
    if needed > rows:
        model.resize_token_embeddings(needed)
    return list(range(rows, needed))
