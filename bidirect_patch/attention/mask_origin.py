"""Whether an attention module runs inside the patched forward of its model, which made the mask; and how that forward attends.

This is not always so: `f = model.forward`, taken before the patch, stays the stock forward and makes a causal mask. Then the
attention module mirrors the mask that it is given.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakSet

import torch

from .padding_and_packing import is_graph_captured

Mode = Literal["bidirectional", "causal"]


class _Recorded:
    """Whether a patched forward is under way in any thread; torch.compile can't read what belongs to one thread."""

    entered = False


class _Forward:
    """A patched forward that is under way. If a signal keeps its end from being noted, it is over when its frame is gone."""

    def __del__(self) -> None:
        with _lock:
            _recorded.entered = bool(_all_threads)


class _ThisThread(threading.local):
    """The patched forwards that are under way in this thread, and how the forward or the layer attends that runs now."""

    def __init__(self) -> None:
        self.forwards: WeakSet[_Forward] = WeakSet()
        self.mode: Mode | None = None


_recorded, _this_thread, _all_threads, _lock = _Recorded(), _ThisThread(), WeakSet[_Forward](), threading.RLock()


def _after_fork() -> None:
    """In a forked child, no other thread exists."""
    global _lock
    _lock = threading.RLock()
    _all_threads.clear()
    _all_threads.update(_this_thread.forwards)
    _recorded.entered = bool(_all_threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def patched_forward() -> Iterator[None]:
    """Around a patched forward."""
    forward = _Forward()
    _this_thread.forwards.add(forward)
    with _lock:
        _all_threads.add(forward)
        _recorded.entered = True  # a layer may be compiled by itself
    try:
        yield
    finally:
        _this_thread.forwards.discard(forward)
        with _lock:
            _all_threads.discard(forward)
            _recorded.entered = bool(_all_threads)


@contextmanager
def attending(mode: Mode) -> Iterator[None]:
    """Around a forward of a model or layer that attends so: of one that the patch is on, or was on in its forward."""
    before, _this_thread.mode = _this_thread.mode, mode
    try:
        yield
    finally:
        _this_thread.mode = before


def mode() -> Mode | None:
    """How the forward attends that runs now in this thread; None outside of `attending`."""
    return _this_thread.mode


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
    return bool(_this_thread.forwards) or torch._C._current_graph_task_id() != -1
