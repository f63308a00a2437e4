"""Whether an attention module runs inside the patched forward of its model, which made the mask.

This is not always so: `f = model.forward`, taken before the patch, stays the stock forward and makes a causal mask. Then the
attention module mirrors the mask that it is given.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .padding_and_packing import is_graph_captured


class _Recorded:
    """Whether a patched forward is under way in any thread; torch.compile can't read what belongs to one thread."""

    entered = False


class _Running(threading.local):
    """How many patched forwards are under way in this thread."""

    depth = 0


_recorded, _running, _all_threads, _lock = _Recorded(), _Running(), set[object](), threading.Lock()


def _after_fork() -> None:
    """In a forked child, no other thread exists."""
    global _lock
    _lock = threading.Lock()
    _all_threads.clear()
    _recorded.entered = _running.depth > 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def patched_forward() -> Iterator[None]:
    """Around a patched forward."""
    me = object()
    _running.depth += 1
    with _lock:
        _all_threads.add(me)
        _recorded.entered = True  # a layer may be compiled by itself
    try:
        yield
    finally:
        _running.depth -= 1
        with _lock:
            _all_threads.discard(me)
            _recorded.entered = bool(_all_threads)


def enter_recorded() -> bool:
    """Before a patched forward that is captured as a graph. Returns what `leave_recorded` is to be given."""
    before = _recorded.entered
    _recorded.entered = True
    return before


def leave_recorded(before: bool) -> None:
    """After a patched forward that is captured as a graph."""
    _recorded.entered = before


def mask_is_ours() -> bool:
    """Whether the mask of the attention module that runs now was made or checked by the patch.

    In a backward pass this is taken for true: gradient checkpointing replays what the forward was given.
    """
    if is_graph_captured():
        return _recorded.entered
    return _running.depth > 0 or torch._C._current_graph_task_id() != -1
