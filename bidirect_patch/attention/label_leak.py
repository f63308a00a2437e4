"""Whether a bidirectional model is trained on labels that it can read off its own input: a warning."""

import sys
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import LabelLeakWarning, warn_user
from ..model.facts import parameter_names
from ..model.walk import modules_of
from ..swap.classes import original
from ..swap.recording import values_are_unknown
from .mixed import holds_open
from .versions import TRAINER_COMPUTES_LOSS

IGNORED = -100
_ENOUGH = 4  # scored tokens to judge by; fewer could all be visible by chance, since MNTP leaves one in ten unchanged

_judged: "WeakSet[nn.Module]" = WeakSet()


def computes_loss(module: nn.Module) -> bool:
    """Whether a model computes a loss of labels by its output embeddings."""
    if not module._modules:  # it holds no embeddings
        return False
    embeddings = getattr(module, "get_output_embeddings", None)
    return callable(embeddings) and "labels" in parameter_names(original(type(module))) and embeddings() is not None


def judge_anew(module: nn.Module) -> None:
    """Forget what was found out about the labels of a model."""
    _judged.discard(module)


def look_around() -> None:
    """Before a forward of a decoder in training: look at the labels of who calls it and computes a loss of them.

    Such a model has no hook of `watch_labels` where the decoder alone was enabled, and PEFT before 0.14 goes around its hooks.
    Trainer takes the labels out of what it gives to the model, for label smoothing and for a loss function of one's own.
    """
    if not torch.is_grad_enabled() or values_are_unknown():
        return
    model: nn.Module | None = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "labels" in code.co_varnames and "self" in code.co_varnames:
            given = frame.f_locals
            owner, labels = given.get("self"), given.get("labels")
            if isinstance(owner, nn.Module) and computes_loss(owner):
                model = model or owner
                if labels is not None:
                    return warn_if_labels_leak(owner, given.get("input_ids"), labels)
            elif model is not None and (frame.f_globals.get("__name__"), code.co_name) == TRAINER_COMPUTES_LOSS:
                return warn_if_labels_leak(model, given["inputs"].get("input_ids"), labels)
        frame = frame.f_back


def warn_if_labels_leak(model: nn.Module, input_ids: Any, labels: Any) -> None:
    """Warn, once per model, if every scored token is visible in the input.

    A position sees both sides, so it sees the token that it must name, and training teaches it to copy. The first batch with
    enough scored tokens decides; later ones cost nothing.

    Args:
        model: whose labels they are; it computes a loss.
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
    _judged.update(filter(computes_loss, modules_of(model)))
    if not hidden.any():
        warn_user(
            f"{type(model).__name__} attends in both directions and was given labels that are all visible in its input, as "
            "for next-token prediction: each position sees the token that it must name, and the model learns to copy it. Hide "
            "tokens (bidirect_patch.MNTPCollator), or train inside `with bidirectional(model, enabled=False):`",
            LabelLeakWarning,
        )
