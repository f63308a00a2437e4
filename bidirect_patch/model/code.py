"""The code behind classes: what was found out about them is found out again once somebody has changed it."""

import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .facts import names_in, with_closures

_MISSING = object()
_STORE = dis.opmap["STORE_GLOBAL"]  # each step of a function's code is two bytes, of which the first says what it does


class Code:
    """The functions that some classes run, as they are when this is made.

    These are the methods of the classes, the functions that these name in their modules, those that the latter name, and so
    on; the entry of an attention function in transformers' tables; and torch's own attention kernel.

    Args:
        classes: the classes.
        kernel: the name of the attention function.
    """

    def __init__(self, classes: Iterable[type], kernel: str) -> None:
        classes = list(classes)
        self._classes, self.kernel = classes, kernel
        self._packages = {"transformers", *(_package(cls) for cls in classes)}
        self._places: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._note(vars(F), "scaled_dot_product_attention")
        for cls in classes:
            for base in _own_bases(cls):
                self._note(vars(base), "forward")
                for name in list(vars(base)):
                    self._note(vars(base), name)

    def __deepcopy__(self, memo: Any) -> "Code":
        return self

    def __reduce__(self) -> Any:  # opened, perhaps in another process, it is the code as it stands there by then
        return Code, (self._classes, self.kernel)

    def is_same(self) -> bool:
        """Whether each of them still is the same function in the same place."""
        return all(place.get(name, _MISSING) is value for place, name, value in self._places.values())

    def _note(self, place: Any, name: str) -> None:
        """Note what stands in a place, and in the places that it names."""
        waiting = [(place, name)]
        while waiting:
            place, name = waiting.pop()
            # vars() of a class is a new object each time, which the entry keeps alive as long as its id is a key.
            value = place.get(name, _MISSING)
            is_function = callable(value) and not isinstance(value, type)
            if (id(place), name) in self._places or not (is_function or name == "forward"):
                continue
            self._places[id(place), name] = place, name, value
            waiting += (each for function in with_closures(value) for each in self._named_in(function))

    def _named_in(self, function: FunctionType) -> Iterator[tuple[Any, str]]:
        if _package(function) not in self._packages:
            return
        for name in names_in(function.__code__):
            value = function.__globals__.get(name)
            # The first look is cheap: asking the abstract class of each object costs more than all the rest here.
            if hasattr(type(value), "keys") and isinstance(value, Mapping) and self.kernel in value:
                yield value, self.kernel
            elif not _is_set_by_its_module(function.__globals__, name):
                yield function.__globals__, name


def _package(of: Any) -> str:
    """The name of the package that a class or function is of."""
    name: str = (of.__module__ or "").partition(".")[0]
    return name


def _is_set_by_its_module(variables: dict[str, Any], name: str) -> bool:
    """Whether a function of a module sets a variable of it, as transformers does with FlashAttention's kernels on first use."""
    if getattr(variables.get(name), "__name__", name) == name:  # as it was defined or imported; or no variable of the module
        return False
    functions = (value for value in list(variables.values()) if isinstance(value, FunctionType))
    codes = (function.__code__ for function in functions if function.__globals__ is variables)
    return any(name in code.co_names and _STORE in code.co_code[::2] and name in _globals_set(code) for code in codes)


@cache
def _globals_set(code: CodeType) -> frozenset[str]:
    """The variables of its module that a function sets."""
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL")


def _own_bases(cls: type) -> Iterator[type]:
    """The classes whose code decides what a class does, without those that all modules and models share."""
    for base in cls.__mro__:
        if base in (PreTrainedModel, nn.Module, object):
            return
        if not base.__module__.startswith("torch."):
            yield base
