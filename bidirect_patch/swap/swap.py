"""Swap the class of one instance for a dynamic subclass, and swap it back.

The subclass keeps the original's `__name__`, `__qualname__` and `__module__`: transformers keys output recorders and
`architectures` on them. It is cached, one per (original class, mixin), so that isinstance, torch.compile guards and
pickling see the same class every time. torch's own `parametrize` and FSDP2's `fully_shard` work the same way.

A mixin is a plain class whose methods call `super()`. Where it needs to know the class that it is mixed into (a
signature, say), it defines `__init_mixed__(cls, original)`, called once per subclass.

What the instance was before is kept in its own `__dict__`, so it travels with deepcopy and
pickle and never outlives the instance.
"""

import copyreg
from importlib import import_module
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import ForeignWrapperError

_subclasses: dict[tuple[type, type], type] = {}


class Swapped:
    """Base of all mixins."""

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
    # In a fresh process unpickling is the first that is heard of this package: generate and save need its hooks.
    import_module("bidirect_patch.patch").install_hooks()
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


def original(cls: type) -> type:
    """The class that `cls` was made from by us, and maybe by FSDP on top, or `cls` itself."""
    return next(c for c in cls.__mro__ if not issubclass(c, Swapped) and not is_sharded(c))


def is_sharded(cls: type) -> bool:
    """Whether `cls` is one of FSDP's, of either kind."""
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in cls.__mro__)


def is_swapped(module: object, mixin: type) -> bool:
    """Whether `module` carries `mixin`, on top or under somebody else's swap."""
    return isinstance(module, mixin)


def swap(
    module: nn.Module, mixin: type[Swapped], attributes: dict[str, Any], buffers: dict[str, Tensor] | None = None
) -> None:
    """Give `module` the class `subclass(type(module), mixin)`, set `attributes` and replace `buffers`, remembering all."""
    cls = subclass(type(module), mixin)  # built before anything is mutated
    buffers = buffers or {}
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__[_record(mixin)] = (before, tuple(attributes), {name: module._buffers[name] for name in buffers})
    module.__dict__.update(attributes)
    module._buffers.update(buffers)
    module.__class__ = cls


_RECORD = "_bidirect_patch_before_"


def _record(mixin: type) -> str:
    return _RECORD + mixin.__name__


def before_swaps(module: nn.Module, name: str, default: Any) -> Any:
    """The attribute `name` as it was before any swap, the class's if the instance had none; `default` if none changed it."""
    records = [record for key, record in module.__dict__.items() if key.startswith(_RECORD)]
    for before, names, _ in records:
        if name in names:
            return before[name] if name in before else getattr(original(type(module)), name, None)
    return default


def check_restorable(module: nn.Module, mixin: type[Swapped]) -> None:
    """Raise ForeignWrapperError when somebody swapped `module`'s class after we did."""
    if type(module).__dict__.get("_mixin") is not mixin:
        top = type(module)
        raise ForeignWrapperError(
            f"{top.__module__}.{top.__qualname__} ({', '.join(b.__name__ for b in top.__bases__)}) was put on this "
            "module after it was made bidirectional, as fully_shard or parametrize do. Undoing ours would drop it: "
            "undo that first, or keep the model bidirectional."
        )
    forward = module.__dict__.get("forward")
    if forward is not None and "_old_forward" not in module.__dict__:  # accelerate's hooks are followed in `restore`
        raise ForeignWrapperError(
            f"{type(module).__name__}.forward was replaced on the instance by {getattr(forward, '__qualname__', forward)} after "
            "it was made bidirectional. It calls what it found then: undo that first, or keep the model bidirectional."
        )


def restore(module: nn.Module, mixin: type[Swapped]) -> None:
    """The exact way back from `swap`."""
    check_restorable(module, mixin)
    before, names, buffers = module.__dict__.pop(_record(mixin))
    for name, buffer in buffers.items():
        now = module._buffers[name]  # the model may have moved since; a buffer that hasn't is put back as it was
        module._buffers[name] = buffer if now is None else buffer.to(now.device, now.dtype)
    for name in names:
        if name in before:
            module.__dict__[name] = before[name]
        else:
            del module.__dict__[name]
    cls, module.__class__ = type(module), type(module).__dict__["_original"]
    # A hook that was put on meanwhile (accelerate's) keeps the forward that it found, which is ours.
    if getattr(module.__dict__.get("_old_forward"), "__func__", None) is getattr(cls, "forward", cls):
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)
