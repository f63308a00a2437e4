"""The hooks by which the labels of a bidirectional model are looked at."""

from collections.abc import Iterable, Set
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
        if computes_loss(module) and not _is_watched(module):
            _watch(module)


def unwatch_labels(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of `watch_labels` off again: of `modules` and around them, wherever no decoder is patched any more.

    Once they are enabled again, their labels are judged anew.
    """
    for module in filter(_is_watched, {*modules, *_watched}):
        if not any(has_mixin(m, BidirectionalModel) or has_mixin(m, CausalBlock) for m in modules_of(module)):
            _unwatch(module)
            judge_anew(module)


def watched_among(modules: Iterable[nn.Module]) -> "WeakSet[nn.Module]":
    """Those among `modules` whose labels are looked at."""
    return WeakSet(filter(_is_watched, modules))


def watch_only(modules: Iterable[nn.Module], watched: Set[nn.Module]) -> None:
    """Of `modules`, look at the labels of those in `watched` and of no others: what `watched_among` found, brought back."""
    for module in modules:
        if module in watched and not _is_watched(module):
            _watch(module)
        elif module not in watched:
            _unwatch(module)


def _is_watched(module: nn.Module) -> bool:
    return _look in module._forward_pre_hooks.values()


def _watch(module: nn.Module) -> None:
    module.register_forward_pre_hook(_look, with_kwargs=True)
    _watched.add(module)


def _unwatch(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _look]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    _watched.discard(module)


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if values_are_unknown():
        return
    given = {**dict(zip(parameter_names(original(type(module))), args)), **kwargs}
    if given.get("labels") is not None:
        warn_if_labels_leak(module, given.get("input_ids"), given["labels"])
