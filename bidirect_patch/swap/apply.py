"""The transaction: everything is prepared first, then one step that nothing can interrupt makes the change.

`prepare` builds the classes and works out every attribute and buffer, and may raise. `commit` runs in C from its start to
its end, where Python handles no signal and switches no thread, and no exception can get out of it. So a module is never half
patched.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, starmap
from typing import Any

from torch import Tensor, nn

from ..errors import ForeignWrapperError
from .classes import RECORD, Swapped, subclass
from .instance_forward import FORWARDS, Rebound, rebound
from .record import MISSING, Plan, Record, buffers_before_patch, record_of


@dataclass(frozen=True)
class Change:
    """What `commit` does to one module."""

    module: nn.Module
    cls: type
    attributes: dict[str, Any]  # to set on the instance
    dropped: tuple[str, ...]  # to take off the instance
    buffers: Mapping[str, Tensor | None]


def apply(
    add: Iterable[tuple[nn.Module, Plan]] = (), remove: Iterable[tuple[nn.Module, type[Swapped]]] = ()
) -> None:
    """Put plans on modules and take others off, all of them or, if one can't be, none.

    A module that already has a plan of the same mixin gets the new one instead.

    Raises:
        ForeignWrapperError: another tool changed a module's class after the patch.
        OrderError: another tool's forward on an instance would go around the patch.
    """
    commit(prepare(add, remove))


def prepare(
    add: Iterable[tuple[nn.Module, Plan]] = (), remove: Iterable[tuple[nn.Module, type[Swapped]]] = ()
) -> list[Change]:
    """All that `commit` will change, module by module. Nothing is changed here; see `apply` for what is raised."""
    modules: dict[int, nn.Module] = {}
    wanted: dict[int, dict[type[Swapped], Plan]] = {}

    def plans(module: nn.Module) -> dict[type[Swapped], Plan]:
        record = record_of(module)
        modules[id(module)] = module
        return wanted.setdefault(id(module), {plan.mixin: plan for plan in record.plans} if record else {})

    for module, mixin in remove:
        plans(module).pop(mixin, None)
    for module, plan in add:
        plans(module)[plan.mixin] = plan
    return [_change(modules[key], tuple(kept.values())) for key, kept in wanted.items()]


def commit(changes: list[Change]) -> None:
    """Make the changes. Each step is a C function, and so is the loop: see the top of this file."""
    modules = [(change.module, "__class__", change.cls) for change in changes]
    attributes = [(change.module.__dict__, change.attributes) for change in changes]
    buffers = [(change.module._buffers, change.buffers) for change in changes]
    dropped = [(change.module.__dict__, name, None) for change in changes for name in change.dropped]
    steps = chain(
        starmap(dict.update, [*attributes, *buffers]),
        starmap(dict.pop, dropped),
        starmap(object.__setattr__, modules),
    )
    deque(steps, maxlen=0)


def _change(module: nn.Module, plans: tuple[Plan, ...]) -> Change:
    record = record_of(module) or Record()
    mixins = [plan.mixin for plan in plans]
    if set(mixins) == {plan.mixin for plan in record.plans}:  # nothing but settings: another tool's class on top may stay
        cls = type(module)
        if "_mixins" in cls.__dict__:
            cls = subclass(cls._original, mixins)  # type: ignore[attr-defined]  # another one if its forward has changed
        forward = Rebound({n: module.__dict__[n] for n in FORWARDS if n in record.before and n in module.__dict__})
    else:
        if record.plans:
            check_class(module)
        cls = subclass(getattr(type(module), "_original", type(module)) if record.plans else type(module), mixins)
        forward = rebound(module, cls)
    attributes = {name: value for plan in plans for name, value in plan.attributes.items()} | forward.attributes
    buffers: dict[str, Tensor | None] = {name: value for plan in plans for name, value in plan.buffers.items()}
    there = {name: module.__dict__.get(name, MISSING) for name in attributes}
    before = {**there, **forward.before, **record.before}
    if plans:
        kept = {name: value for name, value in before.items() if name in attributes or name == "forward"}
        buffers_before = {name: record.buffers.get(name, module._buffers[name]) for name in buffers}
        attributes[RECORD] = Record(plans, kept, buffers_before, forward.wrapper or record.wrapper)
    else:  # the very object that was there before, if there was one; a wrapper that was called inside is on the instance again
        attributes = {name: value for name, value in attributes.items() if record.before.get(name, MISSING) is MISSING}
        attributes |= {"forward": record.before["forward"]} if record.before.get("forward", MISSING) is not MISSING else {}
    gone = {RECORD, *record.before} - set(attributes)
    restored = {name: before[name] for name in gone if before.get(name, MISSING) is not MISSING and name in module.__dict__}
    dropped = [name for name in gone if before.get(name, MISSING) is MISSING] + ["forward"] * forward.drops_forward
    stock = buffers_before_patch(module)
    buffers |= {name: stock[name] for name in record.buffers if name not in buffers}
    return Change(module, cls, {**attributes, **restored}, tuple(dropped), buffers)


def check_class(module: nn.Module) -> None:
    """Raise ForeignWrapperError if another tool changed the class of a patched `module` after the patch."""
    top = type(module)
    if "_mixins" not in top.__dict__:
        raise ForeignWrapperError(
            f"{top.__module__}.{top.__qualname__} ({', '.join(base.__name__ for base in top.__bases__)}) was put on this module "
            "after it was made bidirectional, as fully_shard and parametrize do. Undoing the patch would drop it: undo that "
            "first, or keep the model bidirectional."
        )
