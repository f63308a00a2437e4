"""A forward that another tool put on the instance, before the patch or after it.

Three kinds are known. accelerate's hooks keep the forward that they found in `_old_forward`. accelerate's mixed precision
wraps the class's forward, and its wrappers say so by `__wrapped__`. Any other is an error, since a change of the class would
not reach it.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from ..errors import OrderError
from .classes import class_of_forward, original

_HOOK = "_old_forward"
FORWARDS = ("forward", _HOOK)  # names under which a forward may stand on an instance


def _chain(function: Any) -> Iterator[Any]:
    """A function and all that it wraps, outermost first."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _leads_to(module: nn.Module, forward: Any) -> type | None:
    """The class whose forward a wrapper calls in the end: a dynamic class of ours, or the original; None if unknown."""
    stock = original(type(module))
    own = set(_chain(getattr(stock, "forward", None)))
    for function in _chain(forward):
        cls = class_of_forward(function)
        if cls is not None:
            return cls
        if function in own:
            return stock
    return None


def calls_the_patch(module: nn.Module) -> bool:
    """Whether a call of `module.forward` runs every mixin that the module has."""
    forward = module.__dict__.get(_HOOK, module.__dict__.get("forward"))
    return forward is None or _mixins(type(module)) <= _mixins(_leads_to(module, forward))


class Rebound(NamedTuple):
    """What happens to the forward on an instance whose class changes."""

    attributes: dict[str, Any] = {}  # to set on the instance
    before: dict[str, Any] = {}  # what to put back there when the patch is off
    drops_forward: bool = False  # the instance's `forward` goes, and is called inside instead
    wrappers: dict[type, Any] = {}  # functions to call inside, by the class whose forward they wrap


def rebound(module: nn.Module, cls: Any) -> Rebound:
    """What happens to the forward on `module` when its class becomes `cls`.

    Raises:
        OrderError: the forward on the instance would go around the patch.
    """
    name = _HOOK if _HOOK in module.__dict__ else "forward"
    forward = module.__dict__.get(name)
    if forward is None:
        return Rebound()
    mixins = _mixins(cls)
    reached: Any = _leads_to(module, forward)
    function = getattr(forward, "__func__", None)
    stock: Any = original(type(module))
    if function is not None and (class_of_forward(function) or function in _chain(stock.forward)):
        before = MethodType(stock.forward, module) if class_of_forward(function) else forward
        return Rebound({name: forward if function is cls.forward else MethodType(cls.forward, module)}, {name: before})
    if reached is None and mixins:
        raise OrderError(
            f"{type(module).__name__}.forward was replaced on the instance by {getattr(forward, '__qualname__', forward)}, which "
            "a change of the class would not reach: make the model bidirectional first, then apply the other patch"
        )
    if mixins <= _mixins(reached):
        return Rebound()
    if reached not in cls.__mro__ or function is None:
        raise OrderError(
            f"{type(module).__name__}.forward was wrapped on the instance by another tool (accelerate's prepare, say) in a state "
            "of the patch that is no longer there: unwrap the model first (accelerator.unwrap_model), then change the patch"
        )
    if name == _HOOK:
        return Rebound({name: MethodType(cls.forward, module)}, {name: forward}, False, {reached: function})
    return Rebound({}, {name: forward}, True, {reached: function})


def _mixins(cls: Any) -> set[type]:
    return set(getattr(cls, "_mixins", ()))
