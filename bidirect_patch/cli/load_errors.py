"""Errors of loading, as the commands say them: with the flag to give where FlashAttention is missing.

This module does not need PEFT, so that `bidirect-patch check` runs without it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..checkpoints import loading as checkpoints_loading
from ..errors import BackendError


@contextmanager
def loading(what: str, failure: str = "can't load") -> Iterator[None]:
    """As `checkpoints.loading.loading`; the message names the flag that does without FlashAttention, if that is missing."""
    try:
        with checkpoints_loading.loading(what, failure):
            yield
    except BackendError as error:
        raise BackendError(_with_way_out(str(error))) from error.__cause__


def _with_way_out(message: str) -> str:
    """The message of a missing package; for FlashAttention, with what to do instead."""
    is_flash = re.search("flash.?att", message, re.IGNORECASE)
    return f"{message} Install it, or give --attn_implementation sdpa." if is_flash else message
