"""Gradient checkpointing: a backward pass runs layers again, and they have to attend as they did in their forward.

The function that transformers checkpoints layers with is replaced by one that notes how the forward under way attends. A layer
that is run again for a causal forward, whatever the model is by then, runs as it is without the patch.
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
from ..swap.recording import is_graph_captured

_NAME = "_gradient_checkpointing_func"  # on each module that transformers checkpoints, or on the model that holds them


class _Checkpoint:
    """transformers' checkpointing function, which takes a function and its arguments."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = None if is_graph_captured() else in_use.mode_now()
        return self.checkpoint(function if mode is None else _Layer(function, mode), *args, **kwargs)


class _Layer:
    """A call of a layer, which attends in its backward pass as it did in its forward."""

    def __init__(self, function: Callable[..., Any], mode: Mode) -> None:
        self.function, self.mode = function, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode is Mode.BIDIRECTIONAL:
            self._check_open()
        with in_use.attending(self.mode):
            return self.function(*args, **kwargs)

    def _check_open(self) -> None:
        layer = _layer_of(self.function)
        if layer is not None and not any(map(is_open, modules_of(layer))):
            raise OrderError(
                f"{type(layer).__name__} is causal now, and the backward pass of a bidirectional forward runs it again, since it "
                "is checkpointed: call backward() inside the block, `with bidirectional(model):`, or enable the model for good"
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
