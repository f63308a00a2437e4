"""Every error this package raises: one family, each also a subclass of the fitting builtin.

An error of a call that changes something is raised before anything is changed. Each says what was given and what to do.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BidirectPatchError(Exception):
    """Base of every error raised by bidirect_patch."""


class UnsupportedModelError(BidirectPatchError, TypeError):
    """The model can't be made fully bidirectional; the message names its class and the layers in the way."""


class UnseenLayersError(UnsupportedModelError):
    """The model runs, but `attention_report` could observe none of its decoder layers."""


class StillCausalError(BidirectPatchError, AssertionError):
    """`assert_bidirectional` saw a layer that is not bidirectional."""


class AttentionMaskError(BidirectPatchError, ValueError):
    """An attention_mask, position_ids or cu_seq_lens of a shape, type or content that has no bidirectional meaning."""


class ArgumentError(BidirectPatchError, TypeError):
    """A call got an argument too many, one argument twice, or an argument of a type or shape that it does not take."""


class CacheError(BidirectPatchError, ValueError):
    """A KV cache was passed to a bidirectional model."""


class GenerateError(BidirectPatchError, RuntimeError):
    """`generate` was called on a bidirectional model."""


class ModeConflictError(BidirectPatchError, RuntimeError):
    """Two threads want one model in opposite modes at the same time."""


class ForeignWrapperError(BidirectPatchError, RuntimeError):
    """Another tool changed a module's class after the patch; undoing the patch would remove that change."""


class OrderError(BidirectPatchError, RuntimeError):
    """Steps were taken in an order that can't work, such as sharding before patching."""


class BackendError(BidirectPatchError, ImportError):
    """The attention backend or optional package that was asked for isn't installed."""


class MaskTokenError(BidirectPatchError, ValueError):
    """The mask token isn't exactly one id of the tokenizer."""


class CollatorError(BidirectPatchError, ValueError):
    """Features or settings that can't be collated for MNTP."""


class HeadError(BidirectPatchError, TypeError):
    """The model can't be given an MNTP head."""


class ConfigError(BidirectPatchError, ValueError):
    """Settings, a command's flags, a JSON file, a folder or data that can't be used."""


class LabelLeakWarning(UserWarning):
    """The labels of a bidirectional model are visible in its input, so that it learns to copy them."""


class CausalMaskWarning(UserWarning):
    """A bidirectional model was given a ready mask in which no token sees a later one, and follows it."""


# Libraries that may stand between the user's line and a warning. With another one, the warning names a line of that library.
_LIBRARIES = "bidirect_patch torch transformers peft accelerate sentence_transformers trl wrapt contextlib".split()


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the innermost line that is the user's: neither of this package nor of a library that called it."""
    level = 1
    outer: Any = sys._getframe()
    while outer is not None and str(outer.f_globals.get("__name__")).partition(".")[0] in _LIBRARIES:
        level, outer = level + 1, outer.f_back
    warnings.warn(message, category, stacklevel=level)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def extra_needed(extra: str, subject: str) -> Iterator[None]:
    """Name the package that a failed import lacks, and how to install it.

    Args:
        extra: The extra of this package that brings what is imported in the `with` block.
        subject: Who needs it, as the subject of the message.

    Raises:
        BackendError: An import in the `with` block failed.
    """
    try:
        yield
    except ImportError as error:
        raise BackendError(f"{subject} needs {error.name}: pip install 'bidirect-patch[{extra}]'") from error
