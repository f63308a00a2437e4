"""The modules and parameters inside a module, without their names.

torch's own `modules()` goes through one nested generator a level and writes every name. A change of mode walks a model many
times, so this is most of what it would cost.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """What `module.modules()` gives, in the same order: the module and all inside it, each once."""
    seen: set[Any] = {None}  # a slot may be empty
    ahead: list[Any] = [module]
    while ahead:
        part = ahead.pop()
        if part not in seen:
            seen.add(part)
            yield part
            if part._modules:
                ahead.extend(reversed(part._modules.values()))


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of `module` and of all inside it, in the order of `module.parameters()`; a tied one comes again."""
    return (each for part in modules_of(module) for each in part._parameters.values() if each is not None)
