"""A pickle of a patched model: opening it may be the first use of this package in a process, and puts the hooks in place."""

from typing import Any

from torch import nn

from ..swap.classes import Swapped, rebuild
from ..swap.record import Plan
from . import hooks


class Pickled(Swapped):
    """A patched model, of which a copy or pickle brings the hooks on `generate`, save and load with it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy."""
        function, *rest = super().__reduce_ex__(protocol)
        return _rebuild_with_hooks if function is rebuild else function, *rest


def _rebuild_with_hooks(original: type, mixins: tuple[type[Swapped], ...], *args: Any) -> Any:
    hooks.install()
    return rebuild(original, mixins, *args)


def pickled_plan(model: nn.Module) -> tuple[nn.Module, Plan]:
    """The plan that has the hooks put in place where a pickle of `model` is opened."""
    return model, Plan(Pickled)
