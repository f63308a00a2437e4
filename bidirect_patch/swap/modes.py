"""Who holds a model in which mode, so that two threads or tasks that want opposite modes get an error and not a race."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import ModeConflictError


@dataclass
class Holder:
    """One `with bidirectional(...)` block: its task, the mode it asked for, and what brings back what was there before."""

    owner: tuple[int, int]
    mode: bool
    undo: Callable[[], object]


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
    """Raise ModeConflictError if another thread or task needs `decoder` as it is not in `mode`; call with `lock` held."""
    switch, me = switch_of(decoder), _task()
    wanted = {h.owner: h.mode for h in switch.holders if h.owner != me}  # the innermost block of each
    busy = any(n for thread, n in switch.running.items() if thread != me[0])
    if any(m != mode for m in wanted.values()) or (busy and mode != current):
        words = {True: "bidirectional", False: "causal"}
        raise ModeConflictError(
            f"this thread or task wants {type(decoder).__name__} {words[mode]} while another uses it {words[not mode]}: "
            "one model object has one mode at a time. Give each its own copy (copy.deepcopy), or wait"
        )


def enter(decoder: nn.Module, mode: bool, undo: Callable[[], object]) -> Holder:
    """Register a block; call with `lock` held, after `check`."""
    holder = Holder(_task(), mode, undo)
    switch_of(decoder).holders.append(holder)
    return holder


def leave(decoder: nn.Module, holder: Holder) -> None:
    """Unregister a block and bring back what it found, or leave that to a later block that is still open; with `lock` held.

    Blocks of other threads, of other tasks and of generators need not end in the order in which they began.
    """
    holders = switch_of(decoder).holders
    at = next(i for i, h in enumerate(holders) if h is holder)
    del holders[at]
    if at == len(holders):
        holder.undo()
    else:
        holders[at].undo = holder.undo  # the last one out restores what the first one found


def _task() -> tuple[int, int]:
    """This thread, and the asyncio task in it."""
    task = None
    if "asyncio" in sys.modules:
        try:
            task = sys.modules["asyncio"].current_task()
        except RuntimeError:  # no loop runs in this thread
            pass
    return threading.get_ident(), id(task)


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
