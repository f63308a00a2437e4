"""What loading does with a model or adapter that belongs to bidirectional attention: warn of it, or not since it is enabled."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

enables = False  # whether loading enables it by itself, since `bidirect_patch.auto` was imported
_caller_enables: ContextVar[bool] = ContextVar("_caller_enables", default=False)


def warns() -> bool:
    """Whether nobody enables what is loaded now, so that loading warns of it."""
    return not (enables or _caller_enables.get())


@contextmanager
def caller_enables() -> Iterator[None]:
    """Within the block, what this thread or task loads is enabled by who loads it."""
    before = _caller_enables.set(True)
    try:
        yield
    finally:
        _caller_enables.reset(before)
