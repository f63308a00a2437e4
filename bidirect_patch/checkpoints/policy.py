"""Whether loading a model or adapter that was saved as bidirectional enables it, warns, or does neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

auto_is_imported = False
_caller_enables: ContextVar[bool] = ContextVar("_caller_enables", default=False)
_is_loading: ContextVar[bool] = ContextVar("_is_loading", default=False)


def enables() -> bool:
    """Whether loading enables what is loaded now, since `bidirect_patch.auto` was imported."""
    return auto_is_imported and not _caller_enables.get()


def warns() -> bool:
    """Whether nobody enables what is loaded now, so that loading warns of it."""
    return not (auto_is_imported or _caller_enables.get())


@contextmanager
def caller_enables() -> Iterator[None]:
    """Within the block, what this thread or task loads is enabled by who loads it."""
    before = _caller_enables.set(True)
    try:
        yield
    finally:
        _caller_enables.reset(before)


@contextmanager
def loading() -> Iterator[bool]:
    """Around the loading or building of a model. Gives whether it is the outermost one: not of a part of another model."""
    before = _is_loading.set(True)
    try:
        yield before.old_value is not True
    finally:
        _is_loading.reset(before)
