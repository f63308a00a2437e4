"""The modules, parameters and layers inside a module.

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


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that may be decoder layers, by name: entries with modules inside, of the outermost `ModuleList`s."""
    found: dict[str, nn.Module] = {}
    containers = (nn.ModuleList, nn.ModuleDict)

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(module, nn.ModuleList) and not isinstance(child, containers):
                if any(True for _ in child.children()):
                    found[path] = child
            else:
                walk(child, f"{path}.")

    walk(model, "")
    return found


def is_inside(name: str, outer: str) -> bool:
    """Whether a module of that name is inside another one, by their names in the same model."""
    return name != outer and (not outer or name.startswith(f"{outer}."))


def name_and_class(name: str, module: nn.Module) -> str:
    """A module as a message has it; the outermost one has no name."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__
