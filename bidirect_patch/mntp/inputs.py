"""Checks of what a forward with the MNTP head is called with. None of them waits for a GPU, but those of packed rows."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.model_forward import BidirectionalModel
from ..attention.padding_and_packing import read_sequences
from ..errors import AttentionMaskError, HeadError
from ..model.facts import given_input, parameter_names
from ..swap.classes import has_mixin, original
from ..swap.recording import values_are_unknown


def checked_labels(labels: Any, kwargs: dict[str, Any]) -> Tensor:
    """The labels as int64, (batch, length).

    Rows are picked by their place, so that labels of another shape would score wrong positions without an error.

    Raises:
        HeadError: labels of another type or shape, or `logits_to_keep` beside them.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise HeadError(f"labels must be a tensor of token ids, int64, got {what}")
    if labels.is_meta:
        raise HeadError("labels are on the meta device, without values: give them on the model's device")
    given = given_input(kwargs)
    if isinstance(given, Tensor) and labels.shape != given.shape[:2]:
        raise HeadError(
            f"labels of shape {tuple(labels.shape)} for input of {' x '.join(map(str, given.shape[:2]))} tokens: give one "
            "label per token, -100 where none is scored"
        )
    if labels.dim() != 2:
        raise HeadError(f"labels must have the shape (batch, length), got {tuple(labels.shape)}")
    keep = kwargs.get("logits_to_keep", kwargs.get("num_logits_to_keep"))
    if isinstance(keep, Tensor) or keep:
        raise HeadError("logits_to_keep beside labels: the loss takes every scored position, so leave it out")
    return labels.long()


def checked_ignore_index(kwargs: dict[str, Any]) -> int:
    """The label that is not scored: `ignore_index` of a call, or -100.

    Raises:
        HeadError: it is no integer.
    """
    ignored = kwargs.get("ignore_index", -100)
    if not isinstance(ignored, Integral) or isinstance(ignored, bool):
        raise HeadError(f"ignore_index must be an integer, the label that is not scored; got {ignored!r}")
    return int(ignored)


def check_items(items: Any) -> None:
    """Raise HeadError if `num_items_in_batch` is no one number that a loss can be divided by. What a tensor holds is not read."""
    is_number = items.numel() == 1 if isinstance(items, Tensor) else isinstance(items, Real) and float(items) >= 0
    if items is not None and not is_number:
        raise HeadError(
            f"num_items_in_batch must be the number of scored tokens, an integer or a tensor that holds one; got {items!r}"
        )


def check_targets(targets: Tensor, vocabulary: int | None) -> None:
    """Raise HeadError if a scored label is no id of the vocabulary. On another device than the CPU this would wait for it.

    Args:
        targets: (n,), int64, the scored labels.
        vocabulary: how many ids the head scores; None if that is unknown.
    """
    if targets.device.type != "cpu" or values_are_unknown() or not len(targets):
        return
    low, high = torch.aminmax(targets)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        limit = "" if vocabulary is None else f" below {vocabulary}"
        raise HeadError(
            f"labels hold the id {int(low if low < 0 else high)}: give ids from 0{limit}, and -100 (or ignore_index) where "
            "nothing is scored"
        )


def check_sequences(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse packed rows of a model that drops `position_ids`, since its mask could not tell the sequences apart.

    A few models (Bloom, MPT) take position_ids among **kwargs and do not use them.

    Raises:
        AttentionMaskError: a row holds several sequences.
    """
    positions, given = kwargs.get("position_ids"), given_input(kwargs)
    if positions is None or not isinstance(given, Tensor) or values_are_unknown():
        return
    decoder = next((m for m in model.modules() if has_mixin(m, BidirectionalModel)), None)  # PEFT may be around it
    if decoder is None or "position_ids" in parameter_names(original(type(decoder))):
        return
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 4) != 2:
        return  # a ready mask says itself who attends to whom
    number = read_sequences(mask, positions, None, given.shape[0], given.shape[1], given.device).number
    if number is not None and number.any():
        raise AttentionMaskError(
            f"{type(model).__name__} takes no position_ids, so packed documents can't be told apart: pass one document per row, "
            "with padding"
        )
