"""One message for whatever goes wrong while a model is loaded.

This module does not need PEFT, so that `bidirect-patch check` runs without it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BackendError, BidirectPatchError, ConfigError
from . import one_line


@contextmanager
def loading(what: str, failure: str = "can't load") -> Iterator[None]:
    """Raise an error of this package for any error in the `with` block.

    Args:
        what: What is loaded, for the message.
        failure: The beginning of the message.

    Raises:
        BackendError: A package that is needed is not installed.
        ConfigError: There is nothing of that name, or it is broken.
    """
    try:
        yield
    except BidirectPatchError:
        raise
    except Exception as error:  # a missing or broken checkpoint raises errors of many classes
        kind = BackendError if isinstance(error, ImportError) else ConfigError
        message = f"{failure} {what}: {one_line(error)}"
        if kind is BackendError and re.search("flash.?att", message, re.IGNORECASE):
            message += " Install it, or give --attn_implementation sdpa."
        raise kind(message) from error
