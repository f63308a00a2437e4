"""The hooks by which the labels of a bidirectional model are looked at."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from ..model.facts import parameter_names
from ..model.walk import modules_of
from ..swap.classes import has_mixin, original
from ..swap.recording import values_are_unknown
from .label_leak import computes_loss, judge_anew, warn_if_labels_leak
from .model_forward import BidirectionalModel, CausalBlock

_watched: "WeakSet[nn.Module]" = WeakSet()  # copies of those are not among them


def watch_labels(modules: Iterable[nn.Module]) -> None:
    """Look at the labels of every model among `modules` that computes a loss of them, by a forward pre-hook."""
    for module in modules:
        if computes_loss(module):
            judge_anew(module)
            if _look not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_look, with_kwargs=True)
                _watched.add(module)


def unwatch_labels(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of `watch_labels` off again: of `modules` and around them, wherever no decoder is patched any more."""
    for module in {*modules, *_watched}:
        keys = [key for key, hook in module._forward_pre_hooks.items() if hook is _look]
        if keys and not any(has_mixin(m, BidirectionalModel) or has_mixin(m, CausalBlock) for m in modules_of(module)):
            for key in keys:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
            _watched.discard(module)


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if values_are_unknown():
        return
    given = {**dict(zip(parameter_names(original(type(module))), args)), **kwargs}
    if given.get("labels") is not None:
        warn_if_labels_leak(module, given.get("input_ids"), given["labels"])
