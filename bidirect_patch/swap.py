"""Swap the class of one instance for a dynamic subclass, and swap it back.

The subclass keeps the original's `__name__`, `__qualname__` and `__module__`: transformers keys output recorders and
`architectures` on them. It is cached, one per (original class, mixin), so that isinstance, torch.compile guards and
pickling see the same class every time. torch's own `parametrize` and FSDP2's `fully_shard` work the same way.

A mixin is a plain class whose methods call `super()`. Where it needs to know the class that it is mixed into (a
signature, say), it defines `__init_mixed__(cls, original)`, called once per subclass.

What the instance was before is kept in its own `__dict__` (under `mixin.record`), so it travels with deepcopy and
pickle and never outlives the instance.
"""

import copyreg
from typing import Any

from torch import nn

from .errors import ForeignWrapperError

_MISSING = object()
_subclasses: dict[tuple[type, type], type] = {}


class Swapped:
    """Base of all mixins; `record` names the instance attribute that holds what `swap` changed."""

    record = "_bidirect_patch_record"
    _original: type
    _mixin: type

    @classmethod
    def __init_mixed__(cls, original: type) -> None:
        """Called once on each new subclass of `original`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class can't be found by its name (that names the original), so tell pickle and copy how to make it.
        # What the original class says of itself is kept; only the class to create is replaced.
        reduced = list(super().__reduce_ex__(max(int(protocol), 2)))
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            reduced[0], reduced[1] = _new, (self._original, self._mixin, *reduced[1][1:])
        return tuple(reduced)


def _new(original: type, mixin: type, *args: Any) -> Any:
    cls = subclass(original, mixin)
    return cls.__new__(cls, *args)


def subclass(original: type, mixin: type) -> type:
    """The one dynamic subclass of `original` with `mixin`'s methods on top."""
    key = (original, mixin)
    if key not in _subclasses:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        cls = type(original.__name__, (mixin, original), {**names, "_original": original, "_mixin": mixin})
        cls.__init_mixed__(original)  # type: ignore[attr-defined]
        _subclasses.setdefault(key, cls)
    return _subclasses[key]


def is_swapped(module: object, mixin: type) -> bool:
    """Whether `module` carries `mixin`, on top or under somebody else's swap."""
    return isinstance(module, mixin)


def on_top(module: object, mixin: type) -> bool:
    """Whether `mixin` is the topmost swap, so that it can be undone without dropping another's."""
    return type(module).__dict__.get("_mixin") is mixin


def swap(module: nn.Module, mixin: type[Swapped], attributes: dict[str, Any]) -> None:
    """Give `module` the class `subclass(type(module), mixin)` and set `attributes`, remembering what was there."""
    cls = subclass(type(module), mixin)  # built before anything is mutated
    before = {name: module.__dict__.get(name, _MISSING) for name in attributes}
    module.__dict__.update(attributes)
    # Only what existed is kept: a name that is absent here is deleted again.
    module.__dict__[mixin.record] = ({n: v for n, v in before.items() if v is not _MISSING}, tuple(attributes))
    module.__class__ = cls


def check_restorable(module: nn.Module, mixin: type[Swapped]) -> None:
    """Raise ForeignWrapperError when somebody swapped `module`'s class after we did."""
    if not on_top(module, mixin):
        top = type(module)
        raise ForeignWrapperError(
            f"{top.__module__}.{top.__qualname__} ({', '.join(b.__name__ for b in top.__bases__)}) was put on this "
            "module after it was made bidirectional, as fully_shard or parametrize do. Undoing ours would drop it: "
            "undo that first, or keep the model bidirectional."
        )


def restore(module: nn.Module, mixin: type[Swapped]) -> None:
    """The exact way back from `swap`."""
    check_restorable(module, mixin)
    before, names = module.__dict__.pop(mixin.record)
    for name in names:
        if name in before:
            module.__dict__[name] = before[name]
        else:
            del module.__dict__[name]
    module.__class__ = type(module).__dict__["_original"]
