"""One message for whatever goes wrong while a model, an adapter or a tokenizer is loaded."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..attention.versions import PEFT_READS_A_DEPRECATED_NAME
from ..errors import BackendError, BidirectPatchError, ConfigError, one_line


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
        raise kind(f"{failure} {what}: {one_line(error)}") from error


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hide the warning of transformers about a name that PEFT reads whenever an adapter is put on a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_READS_A_DEPRECATED_NAME, FutureWarning)
        yield
