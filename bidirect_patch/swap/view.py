"""A shallow copy of a module, for calling its own code with some things replaced while the module itself stays untouched."""

from typing import Any

from torch import nn

from .classes import original
from .record import attributes_before_patch, buffers_before_patch, record_of


def view(module: nn.Module, modules: dict[str, Any] | None = None, attributes: dict[str, Any] | None = None) -> Any:
    """`module` with other objects in place of some submodules and instance attributes; all else is shared with it."""
    copy = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": {**module._modules, **(modules or {})}, **(attributes or {})}
    return copy


def unpatched(module: nn.Module) -> Any:
    """A module as it is without the patch, in all its parts: a shallow copy, which shares its weights."""
    parts = {name: None if part is None else unpatched(part) for name, part in module._modules.items()}
    if record_of(module) is None and all(new is old for new, old in zip(parts.values(), module._modules.values())):
        return module
    copy: Any = object.__new__(original(type(module)))
    copy.__dict__ = {**attributes_before_patch(module), "_modules": parts, "_buffers": buffers_before_patch(module)}
    return copy
