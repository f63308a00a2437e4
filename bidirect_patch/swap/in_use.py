"""Who uses a decoder, and how: the blocks that hold it in a mode, and the forwards that are under way.

Two threads or tasks that want opposite modes get an error and not a race. And an attention module asks here whether it runs
inside the patched forward of its model, which made the mask. This is not always so: `f = model.forward`, taken before the
patch, stays the stock forward and makes a causal mask. Then the attention module mirrors the mask that it is given.
"""

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ModeConflictError
from .modes import Mode, Setting
from .record import Found
from .recording import is_graph_captured

Owner = tuple[int, int]  # a thread, and the asyncio task that runs in it (0: none)


@dataclass(eq=False)
class Hold:
    """One `with bidirectional(...)` block on one decoder."""

    wanted: Setting  # what the block asked for
    found: Found  # what to bring back
    owner: Owner
    thread: "weakref.ref[threading.Thread]"
    block: "weakref.ref[Any]"  # the block itself: a block that is gone holds nothing

    @property
    def is_alive(self) -> bool:
        """Whether the block can still end by itself."""
        # Not Thread.is_alive: a signal within it marks the main thread as ended, up to Python 3.12.
        return self.block() is not None and self.thread() in threading.enumerate()


@dataclass(eq=False)
class Forward:
    """One forward under way. If a signal keeps its end from being noted, it is over when its frame is gone."""

    thread: int
    is_over: bool = False

    def __del__(self) -> None:
        if not self.is_over:  # no lock: the thread that frees an object may be one that the lock's holder waits for
            _recorded.count()


@dataclass(eq=False)
class State:
    """The state of one decoder: the blocks that hold it, and the forwards that run now."""

    holds: list[Hold] = field(default_factory=list)
    was_left: bool = False  # whether this process was forked while other threads, which it doesn't have, held the decoder
    forwards: "weakref.WeakSet[Forward]" = field(default_factory=weakref.WeakSet)


class _Recorded:
    """What is under way in any thread; torch.compile can't read what belongs to one thread."""

    entered = False  # whether a patched forward is
    inside: Any = None  # the decoder that the last of them makes the mask for which has one inside it

    def count(self) -> None:
        """Look again, when a forward is over."""
        self.entered = bool(_patched)
        if not self.entered:
            self.inside = None


@dataclass(frozen=True)
class Noted:
    """How a layer attends in its forward, for a backward pass that runs it again."""

    mask_is_ours: bool  # see `mask_is_ours`
    settings: Mapping[nn.Module, Any] = field(default_factory=dict)  # of its attention modules; others keep those that they have


class _ThisThread(threading.local):
    """The patched forwards that are under way in this thread, and how the forward or the layer attends that runs now."""

    def __init__(self) -> None:
        self.patched: weakref.WeakSet[Forward] = weakref.WeakSet()
        self.mode: Mode | None = None
        self.noted: Noted | None = None


lock = threading.RLock()
_states: "weakref.WeakKeyDictionary[nn.Module, State]" = weakref.WeakKeyDictionary()
_patched: "weakref.WeakSet[Forward]" = weakref.WeakSet()  # patched forwards that are under way in any thread
_recorded, _this_thread = _Recorded(), _ThisThread()


def _after_fork() -> None:
    """In a forked child, no other thread exists: the lock is free and their blocks are gone."""
    global lock
    lock = threading.RLock()
    me = threading.get_ident()
    for state in _states.values():
        mine = [hold for hold in state.holds if hold.owner[0] == me]
        state.was_left, state.holds = bool(state.holds and not mine), mine
        for forward in [forward for forward in state.forwards if forward.thread != me]:
            state.forwards.discard(forward)
    _patched.clear()
    _patched.update(_this_thread.patched)
    _recorded.count()


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


def check(decoder: nn.Module, wanted: Setting, now: Setting) -> None:
    """Raise ModeConflictError if another thread or task needs `decoder` to attend in another way than is wanted.

    Call it with `lock` held.

    Args:
        decoder: whose mode is to be changed.
        wanted: what it is to be.
        now: what it is.
    """
    state, me = state_of(decoder), _owner()
    others = {hold.owner: hold.wanted for hold in state.holds if not _is_mine(hold, me)}  # the innermost block of each
    busy = [now] if any(forward.thread != me[0] for forward in state.forwards) else []
    conflict = next((other for other in (*others.values(), *busy) if other.attends != wanted.attends), None)
    if conflict is not None:
        raise ModeConflictError(
            f"this thread or task wants {type(decoder).__name__} {wanted.in_words(conflict)} while another uses it "
            f"{conflict.in_words(wanted)}: one model object has one mode at a time. Give each its own copy (copy.deepcopy), or "
            "wait"
        )


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
        mine = [hold.wanted.mode for hold in state.holds if _is_mine(hold, me)]
    if was_left and not others:
        raise ModeConflictError(
            f"{type(decoder).__name__} was {what} in a process that was forked while another thread had it in a causal block, "
            "which nobody will end here. Call enable_bidirectional(model) or disable_bidirectional(model)"
        )
    if others and (not mine or mine[-1] is not Mode.CAUSAL_BLOCK):  # the innermost block of the caller decides
        raise ModeConflictError(
            f"{type(decoder).__name__} was {what} while another thread or task runs it in a causal block, and this one has none: "
            "the result would be causal. Open `with bidirectional(model, enabled=False):` in this thread too, give each thread "
            "a copy of its own before (copy.deepcopy), or wait"
        )


def caller_holds(decoder: nn.Module) -> bool:
    """Whether the caller has `decoder` in a block. Call it with `lock` held."""
    me = _owner()
    return any(_is_mine(hold, me) for hold in state_of(decoder).holds)


def only_others_hold(decoder: nn.Module) -> bool:
    """Whether blocks hold `decoder`, and none of them is the caller's. Call it with `lock` held."""
    return bool(state_of(decoder).holds) and not caller_holds(decoder)


def set_after_others(decoder: nn.Module, setting: Setting) -> None:
    """Let the blocks of others end in this setting, if only others hold `decoder`. Call it with `lock` held.

    A caller without a block of its own has set the mode for good. Without this, the end of the last block would undo it.
    """
    if only_others_hold(decoder):
        set_after_all(decoder, setting)


def set_after_all(decoder: nn.Module, setting: Setting) -> None:
    """Let the blocks that hold `decoder` end in this setting, the caller's too. Call it with `lock` held."""
    state_of(decoder).holds[0].found = Found(setting)


def after_all(decoder: nn.Module) -> Setting | None:
    """The setting in which the blocks that hold `decoder` will end; None if none does. Call it with `lock` held."""
    holds = state_of(decoder).holds
    return holds[0].found.setting if holds else None


def hold(decoder: nn.Module, wanted: Setting, found: Found, block: Any) -> Hold:
    """Register a block. Call it with `lock` held, after `check`."""
    new = Hold(wanted, found, _owner(), weakref.ref(threading.current_thread()), weakref.ref(block))
    state = state_of(decoder)
    state.holds.append(new)
    state.was_left = False
    return new


def to_restore(decoder: nn.Module, hold: Hold) -> Found | None:
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
def running(model: nn.Module, inside: nn.Module | None = None) -> Iterator[Forward]:
    """Around a forward: no other thread changes the mode of what runs meanwhile.

    Args:
        model: that is called.
        inside: the decoder in it that it makes the mask for, None if that is itself.
    """
    forward = Forward(threading.get_ident())
    with lock:
        forwards = [state_of(each).forwards for each in (model, inside) if each is not None]
        for each in forwards:
            each.add(forward)
    try:
        yield forward
    finally:
        with lock:
            for each in forwards:
                each.discard(forward)
            forward.is_over = True


@contextmanager
def patched(forward: Forward, inside: nn.Module | None) -> Iterator[None]:
    """Around the part of a forward in which the mask that the patch made is on its way to the attention modules.

    Args:
        forward: what `running` gave.
        inside: as for `running`.
    """
    _this_thread.patched.add(forward)
    with lock:
        _patched.add(forward)
        _recorded.entered = True  # a layer may be compiled by itself
        if inside is not None:  # and so may the decoder
            _recorded.inside = inside
    try:
        with attending(Mode.BIDIRECTIONAL):
            yield
    finally:
        _this_thread.patched.discard(forward)
        with lock:
            _patched.discard(forward)
            _recorded.count()


@contextmanager
def attending(mode: Mode | None, noted: Noted | None = None) -> Iterator[None]:
    """Around a forward of a model or layer that attends so: of one that the patch is on, or was on in its forward.

    Args:
        mode: see `mode_now`.
        noted: what is known of the layer's forward, where it may be run again.
    """
    before = _this_thread.mode, _this_thread.noted
    _this_thread.mode, _this_thread.noted = mode, noted
    try:
        yield
    finally:
        _this_thread.mode, _this_thread.noted = before


def mode_now() -> Mode | None:
    """How the forward attends that runs now in this thread; None outside of `attending`."""
    return _this_thread.mode


def enter_recorded(inside: Any) -> tuple[bool, Any]:
    """Before a patched forward that is captured as a graph. Returns what `leave_recorded` is to be given.

    Args:
        inside: as for `running`.
    """
    before = _recorded.entered, _recorded.inside
    _recorded.entered, _recorded.inside = True, inside
    return before


def leave_recorded(before: tuple[bool, Any]) -> None:
    """After a patched forward that is captured as a graph."""
    _recorded.entered, _recorded.inside = before


def is_recorded_inside(decoder: nn.Module) -> bool:
    """Whether a patched forward is under way, of a model around `decoder` that makes its mask; in a graph."""
    return _recorded.inside is decoder


def is_in_patched() -> bool:
    """Whether a patched forward is under way, which makes or checks the mask."""
    return _recorded.entered if is_graph_captured() else bool(_this_thread.patched)


def mask_is_ours() -> bool:
    """Whether the mask of the attention module that runs now was made or checked by the patch.

    In a backward pass of which nothing was noted this is taken for true: a checkpoint gives a layer what its forward was given.
    """
    if is_graph_captured():
        return is_in_patched()
    noted = _this_thread.noted
    return is_in_patched() or _is_in_backward() if noted is None else noted.mask_is_ours


def is_run_again() -> bool:
    """Whether a backward pass runs a forward again of which nothing was noted, outside of a patched one."""
    return _this_thread.noted is None and not _this_thread.patched and _is_in_backward()


def noted_settings(module: nn.Module) -> Any:
    """The settings that an attention module had in the forward of its layer; None if nothing was noted of it."""
    return None if _this_thread.noted is None else _this_thread.noted.settings.get(module)


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
