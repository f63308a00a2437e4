"""A shallow copy of a module, for calling its own code with some things replaced while the module itself stays untouched."""

from typing import Any

from torch import nn


def view(module: nn.Module, modules: dict[str, Any] | None = None, attributes: dict[str, Any] | None = None) -> Any:
    """`module` with other objects in place of some submodules and instance attributes; all else is shared with it."""
    copy = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": {**module._modules, **(modules or {})}, **(attributes or {})}
    return copy
