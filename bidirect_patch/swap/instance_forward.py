"""A forward that another tool put on the instance, before the patch or after it.

Two kinds are known. accelerate's hooks keep the forward that they found in `_old_forward`. accelerate's mixed precision
wraps the class's forward, and its wrappers say so by `__wrapped__`. Any other is asked: it is called once with a `Question` in
place of its input, and if it hands that on, the patch answers. If not, it is an error, since a change of the class would not
reach it.
"""

import inspect
import os
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any, Literal, NamedTuple

from torch import nn

from ..errors import OrderError
from .classes import Question, has_forward, is_ours, original

_HOOK = "_old_forward"
FORWARDS = ("forward", _HOOK)  # names under which a forward may stand on an instance


def _chain(function: Any) -> Iterator[Any]:
    """A function and all that it wraps, outermost first."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _leads_to(module: nn.Module, forward: Any) -> Literal["patch", "stock", "unknown"]:
    """What a forward on the instance calls in the end."""
    own = set(_chain(getattr(original(type(module)), "forward", None)))
    for function in _chain(forward):
        if is_ours(function):
            return "patch"
        if function in own:
            return "stock"
    return "patch" if _answers(module, forward) else "unknown"


# What was answered for a function, by the module that it was asked for. Each is asked once, since it may do other things too.
_answered: "weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[nn.Module, bool]]" = weakref.WeakKeyDictionary()


def _answers(module: nn.Module, forward: Any) -> bool:
    """Whether a forward on the instance hands its input on to the forward of the patch, of this very module."""
    try:
        known = _answered.setdefault(getattr(forward, "__func__", forward), weakref.WeakKeyDictionary())
    except TypeError:  # an object without weak references
        known = weakref.WeakKeyDictionary()
    if module not in known:
        stock: Any = original(type(module))
        names = [name for name in inspect.signature(stock.forward).parameters if name != "self"]
        known[module] = _is_answered(module, forward, (Question,), {}) or (
            bool(names) and _is_answered(module, forward, (), {names[0]: Question})
        )
    return known[module]


def _is_answered(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        forward(*args, **kwargs)
    except Question as answer:
        return answer.args == (module,)
    except Exception:  # whatever else it does with such an input
        return False
    return False


def calls_the_patch(module: nn.Module) -> bool:
    """Whether a call of `module.forward` runs the patch that the module has."""
    forward = module.__dict__.get(_HOOK, module.__dict__.get("forward"))
    return forward is None or not has_forward(type(module)) or _leads_to(module, forward) == "patch"


def name_and_place(function: Any) -> str:
    """What a function is called and where it stands, for a message: functools.wraps gives it the name of what it wraps."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", f"an object of class {type(function).__name__}")
    return name if code is None else f"{name} ({os.path.basename(code.co_filename)}, line {code.co_firstlineno})"


class Rebound(NamedTuple):
    """What happens to the forward on an instance whose class changes."""

    attributes: dict[str, Any] = {}  # to set on the instance
    before: dict[str, Any] = {}  # what to put back there when the patch is off
    drops_forward: bool = False  # the instance's `forward` goes, and is called inside instead
    wrapper: Any = None  # the function to call inside


def rebound(module: nn.Module, cls: Any) -> Rebound:
    """What happens to the forward on `module` when its class becomes `cls`.

    Raises:
        OrderError: the forward on the instance would go around the patch.
    """
    name = _HOOK if _HOOK in module.__dict__ else "forward"
    forward = module.__dict__.get(name)
    if forward is None:
        return Rebound()
    function = getattr(forward, "__func__", None)
    stock: Any = original(type(module))
    if function is not None and (is_ours(function) or function in _chain(stock.forward)):
        before = MethodType(stock.forward, module) if is_ours(function) else forward
        return Rebound({name: forward if function is cls.forward else MethodType(cls.forward, module)}, {name: before})
    reached = _leads_to(module, forward)
    if reached == "patch" or not has_forward(cls):
        return Rebound()
    if reached == "unknown" or function is None:
        raise OrderError(
            f"{type(module).__name__}.forward was replaced on the instance by {name_and_place(forward)}, which "
            "a change of the class would not reach: take that off, call this again, then put it back on"
        )
    if name == _HOOK:
        return Rebound({name: MethodType(cls.forward, module)}, {name: forward}, False, function)
    return Rebound({}, {name: forward}, True, function)
