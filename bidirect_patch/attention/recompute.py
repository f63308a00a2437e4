"""Gradient checkpointing: a backward pass runs layers again, and they have to attend as they did in their forward.

The function that transformers checkpoints layers with is replaced by one that notes how the forward under way attends: in which
mode, with which sinks, and who made the mask. A layer that is run again attends so, whatever the model does by then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import OrderError
from ..model.walk import modules_of
from ..swap import in_use
from ..swap.classes import is_open
from ..swap.modes import Mode
from ..swap.record import settings_of
from ..swap.recording import is_graph_captured
from .module_settings import AttentionSettings

_NAME = "_gradient_checkpointing_func"  # on each module that transformers checkpoints, or on the model that holds them


class _Checkpoint:
    """transformers' checkpointing function, which takes a function and its arguments."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(function if is_graph_captured() else _Layer(function), *args, **kwargs)


class _Layer:
    """A call of a layer, which attends in its backward pass as it did in its forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.mode, self.layer = function, in_use.mode_now(), _layer_of(function)
        modules = () if self.layer is None else modules_of(self.layer)
        settings = {module: own for module in modules if (own := settings_of(module, AttentionSettings)) is not None}
        self.noted = in_use.Noted(in_use.mask_is_ours(), settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode is not Mode.CAUSAL_BLOCK and not all(map(is_open, self.noted.settings)):
            raise OrderError(
                f"{type(self.layer).__name__} is causal now, and the backward pass of a bidirectional forward runs it again, "
                "since it is checkpointed: call backward() inside the block, `with bidirectional(model):`, or enable the model "
                "for good"
            )
        with in_use.attending(self.mode, self.noted):
            return self.function(*args, **kwargs)


def check_checkpoints(model: nn.Module) -> None:
    """Raise OrderError if a forward that goes around the patch runs layers which will be run again, and which nothing notes."""
    for module in modules_of(model):
        checkpoint = module.__dict__.get(_NAME)
        if checkpoint is None or isinstance(checkpoint, _Checkpoint) or not getattr(module, "gradient_checkpointing", False):
            continue
        is_reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)  # these run without gradients at first
        if module.training and (is_reentrant or torch.is_grad_enabled()):
            raise OrderError(
                f"a forward of {type(model).__name__} that was taken before the model was made bidirectional was called with "
                "gradient checkpointing: call the model itself, once at least, or gradient_checkpointing_disable()"
            )


def note_checkpoints(model: nn.Module) -> None:
    """Before a forward: in training, let the backward pass of its layers attend as this forward does."""
    if not (model.training and torch.is_grad_enabled()):
        return
    for module in modules_of(model):
        checkpoint = module.__dict__.get(_NAME)
        if checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
            module.__dict__[_NAME] = _Checkpoint(checkpoint)


def forget_checkpoints(model: nn.Module) -> None:
    """Undo `note_checkpoints`."""
    for module in modules_of(model):
        checkpoint = module.__dict__.get(_NAME)
        if isinstance(checkpoint, _Checkpoint):
            module.__dict__[_NAME] = checkpoint.checkpoint


def _layer_of(function: Any) -> nn.Module | None:
    """The module that a checkpointed function calls: it is a bound method, or a partial of one or of a plain function."""
    inner = getattr(function, "func", function)
    candidates = (getattr(inner, "__self__", None), *getattr(function, "args", ()))
    return next((each for each in candidates if isinstance(each, nn.Module)), None)
