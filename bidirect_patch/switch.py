"""Who holds a model in which mode, so that two threads that want opposite modes get an error and not a race."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from .errors import ModeConflictError


@dataclass
class Holder:
    """One `with bidirectional(...)` block: its thread, the mode it asked for, the mode that was there before."""

    thread: int
    mode: bool
    found: bool


@dataclass
class Switch:
    """The state of one decoder: blocks that hold it, and forwards under way by thread."""

    holders: list[Holder] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)


lock = threading.RLock()
_switches: WeakKeyDictionary[nn.Module, Switch] = WeakKeyDictionary()


def switch_of(decoder: nn.Module) -> Switch:
    """The switch of a decoder; call with `lock` held."""
    return _switches.setdefault(decoder, Switch())


def check(decoder: nn.Module, mode: bool, current: bool) -> None:
    """Raise ModeConflictError if another thread needs `decoder` as it is not in `mode`; call with `lock` held."""
    switch, me = switch_of(decoder), threading.get_ident()
    wanted = {h.thread: h.mode for h in switch.holders if h.thread != me}  # the innermost block of each thread
    busy = any(n for thread, n in switch.running.items() if thread != me)
    if any(m != mode for m in wanted.values()) or (busy and mode != current):
        words = {True: "bidirectional", False: "causal"}
        raise ModeConflictError(
            f"this thread wants {type(decoder).__name__} {words[mode]} while another thread uses it {words[not mode]}: "
            "one model object has one mode at a time. Give each thread its own copy (copy.deepcopy), or wait"
        )


def enter(decoder: nn.Module, mode: bool, current: bool) -> Holder:
    """Register a block; call with `lock` held, after `check`."""
    holder = Holder(threading.get_ident(), mode, current)
    switch_of(decoder).holders.append(holder)
    return holder


def leave(decoder: nn.Module, holder: Holder) -> bool | None:
    """Unregister a block. The mode to restore, or None while another thread's block still needs the present one."""
    holders = switch_of(decoder).holders
    at = next(i for i, h in enumerate(holders) if h is holder)
    del holders[at]
    later = next((h for h in holders[at:] if h.thread != holder.thread), None)
    if later is None:
        return holder.found
    later.found = holder.found  # the last one out restores what the first one found
    return None


@contextmanager
def running(decoder: nn.Module) -> Iterator[None]:
    """Mark a forward under way in this thread."""
    me = threading.get_ident()
    with lock:
        counts = switch_of(decoder).running
        counts[me] = counts.get(me, 0) + 1
    try:
        yield
    finally:
        with lock:
            counts[me] -= 1
            if not counts[me]:
                del counts[me]
