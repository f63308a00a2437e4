"""Who holds a model in which mode, so that two threads or tasks that want opposite modes get an error and not a race."""

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..errors import ModeConflictError

Owner = tuple[int, int]  # a thread, and the asyncio task that runs in it (0: none)
Mode = tuple[int, int] | Literal[False]  # bidirectional, with its sinks; or causal


@dataclass(eq=False)
class Hold:
    """One `with bidirectional(...)` block on one decoder."""

    mode: Mode  # what the block asked for
    found: Any  # the state to bring back
    owner: Owner
    thread: "weakref.ref[threading.Thread]"
    block: "weakref.ref[Any]"  # the block itself: a block that is gone holds nothing

    @property
    def is_alive(self) -> bool:
        """Whether the block can still end by itself."""
        # Not Thread.is_alive: a signal within it marks the main thread as ended, up to Python 3.12.
        return self.block() is not None and self.thread() in threading.enumerate()


class Run:
    """One forward under way. If a signal keeps its end from being noted, it is over when its frame is gone."""


@dataclass(eq=False)
class State:
    """The state of one decoder: the blocks that hold it, and the forwards that run now, each with its thread."""

    holds: list[Hold] = field(default_factory=list)
    was_left: bool = False  # whether this process was forked while other threads, which it doesn't have, held the decoder
    running: "weakref.WeakKeyDictionary[Run, int]" = field(default_factory=weakref.WeakKeyDictionary)


lock = threading.RLock()
_states: "weakref.WeakKeyDictionary[nn.Module, State]" = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    """In a forked child, no other thread exists: the lock is free and their blocks are gone."""
    global lock
    lock = threading.RLock()
    me = threading.get_ident()
    for state in _states.values():
        mine = [hold for hold in state.holds if hold.owner[0] == me]
        state.was_left, state.holds = bool(state.holds and not mine), mine
        for run in [run for run, thread in state.running.items() if thread != me]:
            del state.running[run]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def decoders() -> list[Any]:
    """Every decoder whose mode was ever asked for or changed, and that is still there."""
    with lock:
        return list(_states)


def state_of(decoder: nn.Module) -> State:
    """The state of a decoder, without blocks that are gone. Call it with `lock` held."""
    state = _states.setdefault(decoder, State())
    for gone, later in zip(state.holds, state.holds[1:]):
        if not gone.is_alive:
            later.found = gone.found  # a block that still ends brings back what the first one found
    state.holds = [hold for hold in state.holds if hold.is_alive]
    return state


def check(decoder: nn.Module, mode: Mode, current: Mode) -> None:
    """Raise ModeConflictError if another thread or task needs `decoder` in another mode. Call it with `lock` held."""
    state, me = state_of(decoder), _owner()
    others = {hold.owner: hold.mode for hold in state.holds if not _is_mine(hold, me)}  # the innermost block of each
    busy = [current] if any(thread != me[0] for thread in state.running.values()) else []
    conflict = next((other for other in (*others.values(), *busy) if other != mode), mode)
    if conflict != mode:
        raise ModeConflictError(
            f"this thread or task wants {type(decoder).__name__} {_in_words(mode, conflict)} while another uses it "
            f"{_in_words(conflict, mode)}: one model object has one mode at a time. Give each its own copy (copy.deepcopy), or "
            "wait"
        )


def _in_words(mode: Mode, other: Mode) -> str:
    """A mode in words; with its sinks if the other mode differs in nothing else."""
    if mode is False:
        return "causal"
    return f"bidirectional with {mode[0]} sink tokens and {mode[1]} sinkless layers" if other else "bidirectional"


def check_caller(decoder: nn.Module, what: str = "called") -> None:
    """Raise ModeConflictError if only others hold `decoder` in a causal block, or did when this process was forked.

    Args:
        decoder: which is in a causal block.
        what: what the caller does with it: "called", "copied" or "saved".
    """
    me = _owner()
    with lock:
        state = state_of(decoder)
        others, was_left = bool(state.holds), state.was_left
        mine = [hold.mode for hold in state.holds if _is_mine(hold, me)]
    if was_left and not others:
        raise ModeConflictError(
            f"{type(decoder).__name__} was {what} in a process that was forked while another thread had it in a causal block, "
            "which nobody will end here. Call enable_bidirectional(model) or disable_bidirectional(model)"
        )
    if others and (not mine or mine[-1]):  # the innermost block of the caller decides
        raise ModeConflictError(
            f"{type(decoder).__name__} was {what} while another thread or task runs it in a causal block, and this one has none: "
            "the result would be causal. Open `with bidirectional(model, enabled=False):` in this thread too, give each thread "
            "a copy of its own before (copy.deepcopy), or wait"
        )


def only_others_hold(decoder: nn.Module) -> bool:
    """Whether blocks hold `decoder`, and none of them is the caller's. Call it with `lock` held."""
    holds, me = state_of(decoder).holds, _owner()
    return bool(holds) and not any(_is_mine(hold, me) for hold in holds)


def set_after_others(decoder: nn.Module, found: Any) -> None:
    """Let the blocks of others end in this state, if only others hold `decoder`. Call it with `lock` held.

    A caller without a block of its own has set the mode for good. Without this, the end of the last block would undo it.
    """
    if only_others_hold(decoder):
        state_of(decoder).holds[0].found = found


def hold(decoder: nn.Module, mode: Mode, found: Any, block: Any) -> Hold:
    """Register a block. Call it with `lock` held, after `check`."""
    new = Hold(mode, found, _owner(), weakref.ref(threading.current_thread()), weakref.ref(block))
    state = state_of(decoder)
    state.holds.append(new)
    state.was_left = False
    return new


def to_restore(decoder: nn.Module, hold: Hold) -> Any:
    """What to bring back when this block ends, or None if a later block is still open, which then brings it back.

    Blocks of other threads, of other tasks and of generators need not end in the order in which they began. Call it with
    `lock` held.
    """
    holds = state_of(decoder).holds
    is_last = holds[-1] is hold if hold in holds else not holds  # not among them: its thread is gone
    return hold.found if is_last else None


def release(decoder: nn.Module, hold: Hold) -> None:
    """Unregister a block; a later one that is still open will bring back what this one found. Call it with `lock` held."""
    holds = state_of(decoder).holds
    if hold in holds:
        at = holds.index(hold)
        if at + 1 < len(holds):
            holds[at + 1].found = hold.found
        del holds[at]


def _owner() -> Owner:
    task = None
    if "asyncio" in sys.modules:
        try:
            task = sys.modules["asyncio"].current_task()
        except RuntimeError:  # no event loop runs in this thread
            pass
    return threading.get_ident(), 0 if task is None else id(task)


def _is_mine(hold: Hold, me: Owner) -> bool:
    """A block of this task, or of the code around the event loop: that code waits until the loop ends."""
    return hold.owner in (me, (me[0], 0))


@contextmanager
def running(decoder: nn.Module) -> Iterator[None]:
    """Note a forward of this thread, so that no other thread changes the mode meanwhile."""
    run = Run()
    with lock:
        running = state_of(decoder).running
        running[run] = threading.get_ident()
    try:
        yield
    finally:
        with lock:
            running.pop(run, None)
