"""The dynamic subclass that a patched instance gets in place of its own class.

The subclass keeps the original's `__name__`, `__qualname__` and `__module__`: transformers keys output recorders and
`architectures` on them. There is one subclass per original class and set of mixins, so that isinstance, the guards of
torch.compile and pickle always see the same class. torch's own `parametrize` and FSDP2's `fully_shard` work in the same way.
"""

import copyreg
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any
from weakref import WeakSet

RECORD = "_bidirect_patch"  # the one key in an instance's __dict__ under which all that we know of it is kept
_LINK = "_bidirect_patch_link"  # on a dynamic class: its forward, which hands on to the class below
_entries: "WeakSet[Any]" = WeakSet()  # the forwards of all dynamic classes
_SHARDED = frozenset({"FSDPModule", "FullyShardedDataParallel"})  # by name: FSDP need not be imported


class Swapped:
    """Base of all mixins. A mixin is a plain class; its methods may call `super()`."""

    rank = 0  # of two mixins on one instance, the one of higher rank is called first
    opens = False  # whether a module with this mixin attends in both directions, or makes a mask for that
    note = ""  # what repr(model) says about a module with this mixin, where `note_of` doesn't say more

    _original: type
    _mixins: tuple[type["Swapped"], ...]

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """Finish a new dynamic class.

        Args:
            below: the class that the new class is put on: the original, or a dynamic class of lower rank.
            original: the class of the model's own code.
        """

    @classmethod
    def note_of(cls, module: Any) -> str:
        """What `repr(model)` says about a module with this mixin."""
        return cls.note

    def extra_repr(self) -> str:
        """What `repr(model)` shows in the module's brackets: the module's own text, then the patch's."""
        notes = [mixin.note_of(self) for mixin in self._mixins]
        return ", ".join(filter(None, [super().extra_repr(), *notes]))  # type: ignore[misc]  # nn.Module has it

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds a class by its name, and that name belongs to the original. So the original and the mixins are
        # stored; the rest of what the original class stores is kept.
        reduced = list(super().__reduce_ex__(max(int(protocol), 2)))
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]  # typeshed lacks it
            reduced[0], reduced[1] = rebuild, (self._original, self._mixins, *reduced[1][1:])
        return tuple(reduced)


def rebuild(original: type, mixins: tuple[type[Swapped], ...], *args: Any) -> Any:
    """An empty instance of a dynamic class, out of what a pickle keeps."""
    cls = subclass(original, mixins)
    return cls.__new__(cls, *args)


class Question(BaseException):
    """Given to a forward in place of its input: the forward of a dynamic class answers by raising one, with its module."""


_subclasses: dict[tuple[Any, ...], type] = {}


def subclass(original: type, mixins: Sequence[type[Swapped]]) -> type:
    """The one dynamic subclass of `original` with `mixins`; `original` itself if there are none.

    A new one is made once somebody has given `original` another forward, since the mixins read how it is called.
    """
    ordered = tuple(sorted(mixins, key=lambda mixin: (mixin.rank, mixin.__name__)))
    if not ordered:
        return original
    key = original, ordered, getattr(original, "forward", None)
    if key not in _subclasses:
        below = subclass(original, ordered[:-1])
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        cls = type(original.__name__, (ordered[-1], below), {**names, "_original": original, "_mixins": ordered})
        ordered[-1].build.__func__(cls, below, original)  # type: ignore[attr-defined]  # its own: `below` has been built
        _subclasses.setdefault(key, cls)
    return _subclasses[key]


def set_forward(cls: Any, forward: Callable[..., Any], below: type) -> None:
    """Make `forward` the forward of a dynamic class.

    Another tool may keep `cls.forward` beyond the patch (accelerate's mixed precision does), or follow its `__wrapped__` to
    the end to take a wrapper off. So the function, and what its `__wrapped__` names, run whatever the patch is on the
    instance at the time of the call.

    Args:
        cls: the dynamic class.
        forward: called as `forward(inner, self, *args, **kwargs)`; `inner` is the forward below it, to hand on to.
        below: the class that `cls` was put on.
    """
    stock = original(below)
    inner = getattr(below, _LINK, None) or _bottom(stock)

    def link(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(inner, self, *args, **kwargs)

    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (args[0] if args else kwargs.get(first)) is Question:
            raise Question(self)
        run = getattr(type(self), _LINK, None) or stock.forward  # type: ignore[attr-defined]  # a module
        return run(self, *args, **kwargs)

    twin = FunctionType(entry.__code__, entry.__globals__, entry.__name__, entry.__defaults__, entry.__closure__)
    described: Any = stock.forward  # type: ignore[attr-defined]
    signature = inspect.signature(described)  # Trainer picks columns by it
    first = next((name for name in signature.parameters if name != "self"), "")
    for function in (entry, twin):
        function.__name__, function.__qualname__, function.__doc__ = (
            described.__name__,
            described.__qualname__,
            described.__doc__,
        )
        function.__module__ = described.__module__
        function.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
    entry.__wrapped__ = twin  # type: ignore[attr-defined]
    _entries.update((entry, twin))
    setattr(cls, _LINK, staticmethod(link))
    cls.forward = entry


def _bottom(stock: Any) -> Callable[..., Any]:
    """The last forward of a chain: the model's own, or another tool's wrapper of it that was taken off the instance."""

    def bottom(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        run = stock.forward if record is None or record.wrapper is None else record.wrapper
        return run(self, *args, **kwargs)

    return bottom


def is_ours(function: Any) -> bool:
    """Whether a function is the forward of a dynamic class."""
    return isinstance(function, FunctionType) and function in _entries


def has_forward(cls: type) -> bool:
    """Whether the patch changes the forward of a class."""
    return getattr(cls, _LINK, None) is not None


def original(cls: type) -> type:
    """The model's own class under our dynamic class, and under FSDP's on top of that; else `cls` itself."""
    for c in cls.__mro__:
        if not issubclass(c, Swapped) and not is_sharded(c):
            return c
    return cls


def is_sharded(cls: type) -> bool:
    """Whether `cls` is a class of FSDP's, of either kind."""
    for c in cls.__mro__:  # loops, since every module of a model is asked, and a generator costs more than the rest
        if c.__name__ in _SHARDED:
            return True
    return False


def has_mixin(module: object, mixin: type[Swapped]) -> bool:
    """Whether `module` has `mixin`, also under a class that another tool put on top."""
    return isinstance(module, mixin)


def is_open(module: object) -> bool:
    """Whether the patch makes a module attend in both directions, or a model make a mask for that."""
    return any(mixin.opens for mixin in getattr(type(module), "_mixins", ()))
