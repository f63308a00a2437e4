"""A warning where a bidirectional model is trained on labels that it can read off its own input."""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import LabelLeakWarning
from ..model.facts import parameter_names
from ..model.walk import modules_of
from ..swap.classes import has_mixin, original
from ..swap.recording import values_are_unknown
from .model_forward import BidirectionalModel, CausalBlock, holds_open

IGNORED = -100
_ENOUGH = 4  # scored tokens to judge by; fewer could all be visible by chance, since MNTP leaves one in ten unchanged

_watched: "WeakSet[nn.Module]" = WeakSet()  # copies of those are not among them
_judged: "WeakSet[nn.Module]" = WeakSet()


def watch_labels(modules: Iterable[nn.Module]) -> None:
    """Look at the labels of every model among `modules` that computes a loss of them, by a forward pre-hook."""
    for module in modules:
        if not module._modules:  # it holds no embeddings
            continue
        embeddings = getattr(module, "get_output_embeddings", None)
        if callable(embeddings) and "labels" in parameter_names(original(type(module))) and embeddings() is not None:
            _judged.discard(module)
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


def warn_if_labels_leak(model: nn.Module, input_ids: Any, labels: Any) -> None:
    """Warn, once per model, if every scored token is visible in the input.

    A position sees both sides, so it sees the token that it must name, and training teaches it to copy. The first batch with
    enough scored tokens decides; later ones cost nothing.

    Args:
        model: whose labels they are.
        input_ids: (batch, length), int64, other types are ignored.
        labels: (batch, length), int64, -100 where not scored, or anything else.
    """
    if model in _judged or not isinstance(input_ids, Tensor) or not isinstance(labels, Tensor):
        return
    if input_ids.dim() != 2 or input_ids.shape != labels.shape or input_ids.device != labels.device:
        return
    if labels.is_meta or labels.layout is not torch.strided:
        return
    scored = labels[:, 1:] != IGNORED
    hidden = scored & (labels[:, 1:] != input_ids[:, 1:])
    if int(scored.sum()) < _ENOUGH:
        return
    if not holds_open(model):
        return  # in a causal block
    _judged.update(module for module in modules_of(model) if _look in module._forward_pre_hooks.values())
    if not hidden.any():
        warnings.warn(
            f"{type(model).__name__} attends in both directions and was given labels that are all visible in its input, as "
            "for next-token prediction: each position sees the token that it must name, and the model learns to copy it. Hide "
            "tokens (bidirect_patch.MNTPCollator), or train inside `with bidirectional(model, enabled=False):`",
            LabelLeakWarning,
            stacklevel=4,
        )
