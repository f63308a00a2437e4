"""The dynamic subclass that a patched instance gets in place of its own class.

The subclass keeps the original's `__name__`, `__qualname__` and `__module__`: transformers keys output recorders and
`architectures` on them. There is one subclass per original class and set of mixins, so that isinstance, the guards of
torch.compile and pickle always see the same class. torch's own `parametrize` and FSDP2's `fully_shard` work in the same way.
"""

import copyreg
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FunctionType
from typing import Any

RECORD = "_bidirect_patch"  # the one key in an instance's __dict__ under which all that we know of it is kept
_OURS = "_bidirect_patch_class"  # on a forward function of ours: the dynamic class that it belongs to


class Swapped:
    """Base of all mixins. A mixin is a plain class; its methods may call `super()`."""

    rank = 0  # of two mixins on one instance, the one of higher rank is called first
    note = ""  # what repr(model) says about a module with this mixin

    _original: type
    _mixins: tuple[type["Swapped"], ...]

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """Finish a new dynamic class.

        Args:
            below: the class that the new class is put on: the original, or a dynamic class of lower rank.
            original: the class of the model's own code.
        """

    def extra_repr(self) -> str:
        """What `repr(model)` shows in the module's brackets: the module's own text, then the patch's."""
        notes = [mixin.note for mixin in self._mixins if mixin.note]
        return ", ".join(filter(None, [super().extra_repr(), *notes]))  # type: ignore[misc]  # nn.Module has it

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle looks a class up by its name, which is the original's. So say how to make the class; the rest of what
        # the original class says of itself is kept.
        reduced = list(super().__reduce_ex__(max(int(protocol), 2)))
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]  # typeshed lacks it
            reduced[0], reduced[1] = _rebuild, (self._original, self._mixins, *reduced[1][1:])
        return tuple(reduced)


def _rebuild(original: type, mixins: tuple[type[Swapped], ...], *args: Any) -> Any:
    # In a fresh process, unpickling may be the first use of this package: generate and save need its hooks.
    import_module("bidirect_patch.checkpoints.hooks").install()
    cls = subclass(original, mixins)
    return cls.__new__(cls, *args)


_subclasses: dict[tuple[type, tuple[type[Swapped], ...]], type] = {}


def subclass(original: type, mixins: Sequence[type[Swapped]]) -> type:
    """The one dynamic subclass of `original` with `mixins`; `original` itself if there are none."""
    ordered = tuple(sorted(mixins, key=lambda mixin: (mixin.rank, mixin.__name__)))
    if not ordered:
        return original
    if (original, ordered) not in _subclasses:
        below = subclass(original, ordered[:-1])
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        cls = type(original.__name__, (ordered[-1], below), {**names, "_original": original, "_mixins": ordered})
        cls.build(below, original)  # type: ignore[attr-defined]  # a Swapped
        _subclasses.setdefault((original, ordered), cls)
    return _subclasses[original, ordered]


def set_forward(cls: Any, forward: Callable[..., Any], below: type, mixin: type[Swapped]) -> None:
    """Make `forward` the forward of a dynamic class, for instances that still have `mixin`.

    Another tool may keep the function beyond the patch (accelerate's mixed precision does). The function then calls the
    code below it. Tools that follow `__wrapped__` to its end, to take a wrapper off, find the same function again, and not
    one that goes around the patch.

    Args:
        forward: called as `forward(below, self, *args, **kwargs)`, where `below` is the forward function to hand on to.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = below.forward  # type: ignore[attr-defined]  # a module
        if not isinstance(self, mixin):
            return inner(self, *args, **kwargs)
        record = self.__dict__.get(RECORD)
        if record is not None and record.wrappers:
            inner = record.wrappers.get(below, inner)
        return forward(inner, self, *args, **kwargs)

    stock = below.forward  # type: ignore[attr-defined]
    signature = inspect.signature(stock)  # Trainer picks columns by it
    twin = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    for function in (method, twin):
        function.__name__, function.__qualname__, function.__doc__ = stock.__name__, stock.__qualname__, stock.__doc__
        function.__module__ = stock.__module__
        function.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
        setattr(function, _OURS, cls)
    method.__wrapped__ = twin  # type: ignore[attr-defined]
    cls.forward = method


def class_of_forward(function: Any) -> type | None:
    """The dynamic class that a forward function of ours belongs to; None for a function that is not ours."""
    cls = getattr(function, _OURS, None)  # functools.wraps copies attributes, so a wrapper may have it too
    ours = cls.__dict__.get("forward") if cls is not None else None
    return cls if ours is not None and function in (ours, ours.__wrapped__) else None


def original(cls: type) -> type:
    """The model's own class under our dynamic class, and under FSDP's on top of that; else `cls` itself."""
    return next(c for c in cls.__mro__ if not issubclass(c, Swapped) and not is_sharded(c))


def is_sharded(cls: type) -> bool:
    """Whether `cls` is a class of FSDP's, of either kind."""
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in cls.__mro__)


def has_mixin(module: object, mixin: type[Swapped]) -> bool:
    """Whether `module` has `mixin`, also under a class that another tool put on top."""
    return isinstance(module, mixin)
