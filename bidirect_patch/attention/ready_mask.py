"""The mask of each backend: what a patched model hands to its own mask code, which passes it on, and what each layer takes of it.

The mask travels as the one normal argument, so that gradient checkpointing replays it and threads don't share it. For a
decoder whose layers have K different spans:

| backend           | the model hands on                                | an attention module takes                          |
|-------------------|---------------------------------------------------|----------------------------------------------------|
| eager, sdpa       | a tensor (batch, K, query, key), see `dense`      | its channel, or None where nothing is hidden       |
| flex_attention    | a BlockMask or `SpanBlockMasks`, see `flex`       | its BlockMask                                      |
| flash_attention_* | numbers of sequences (batch, K, 1, key), `flash`  | a 2D mask, or boundaries of sequences              |

A mask that the user made stays the user's: (1 or batch, 1 or heads, 1 or query, key), bool (True is visible) or additive.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionMaskError
from ..model.config import Backend
from ..model.windows import Span
from ..swap.recording import values_are_unknown
from . import packed_sdpa
from .dense import additive, dense_mask, hides_nothing
from .flash import sequence_numbers
from .padding_and_packing import Sequences, check_readable
from .versions import FLEX_TAKES_BLOCK_MASK, HAS_MASKING_UTILS, READY_MASKS_ARE_INVERTED


def make_mask(
    sequences: Sequences, spans: tuple[Span, ...], backend: Backend, dtype: torch.dtype, ones_and_zeros: bool = False
) -> Any:
    """The mask for the model's own mask code; see the table above.

    Args:
        sequences: what the user's arguments say.
        spans: the different spans of the decoder's layers.
        backend: the decoder's attention backend.
        dtype: of an additive mask.
        ones_and_zeros: whether this model's mask code takes ones and zeros and inverts them.
    """
    if backend == "flash":
        return sequence_numbers(sequences, spans)
    if backend == "flex" and FLEX_TAKES_BLOCK_MASK:
        if not (sequences.hide_nothing(spans) and HAS_MASKING_UTILS):  # before 4.53 a tensor is taken for a 2D mask there
            from .flex import block_masks

            return block_masks(sequences, spans)
    mask = dense_mask(sequences, spans, dtype, backend in ("sdpa", "flex"), ones_and_zeros)
    return packed_sdpa.with_lengths(mask, sequences, spans) if backend == "sdpa" else mask


def pick(mask: Any, span: int, spans: int, may_omit: bool) -> Any:
    """What one attention module takes of the mask that its model handed on.

    Args:
        mask: what `make_mask` or `users_mask` made.
        span: which of the decoder's spans the module has.
        spans: how many there are.
        may_omit: whether None means "sees everything" to the module, so that the fastest kernel can be taken.
    """
    if not isinstance(mask, Tensor):
        return [mask, *getattr(mask, "others", [mask] * (spans - 1))][span]
    if mask.dim() != 4:
        return mask
    channels = mask
    if spans > 1 and mask.shape[1] >= spans:
        width = mask.shape[1] // spans
        channels = mask[:, span * width : (span + 1) * width]
    if may_omit and hides_nothing(channels):
        return None
    return packed_sdpa.pick(mask, span, channels)


def is_users_own(mask: Any) -> bool:
    """Whether a mask is finished, so that it is taken as it is."""
    return isinstance(mask, dict) or type(mask).__name__ == "BlockMask" or (isinstance(mask, Tensor) and mask.dim() == 4)


def users_mask(
    mask: Any, spans: int, batch: int, length: int, heads: int, backend: Backend, dtype: torch.dtype, as_ones: bool
) -> Any:
    """A user's finished mask in the form that `pick` reads: one group of channels per span.

    Args:
        mask: (1 or batch, 1 or heads, 1 or length, length), bool or floating point; a BlockMask; or a dict of such by kind of
            layer, as transformers' own mask functions make.
        spans: how many different spans the decoder has.
        batch: rows.
        length: tokens per row.
        heads: attention heads of the model.
        backend: the decoder's attention backend.
        dtype: of an additive mask.
        as_ones: whether this model's mask code takes ones and zeros and inverts them.

    Raises:
        AttentionMaskError: another shape or dtype, or a backend that takes no such mask.
    """
    if isinstance(mask, dict):
        _check_values(mask, backend)
        return {
            kind: users_mask(each, spans, batch, length, heads, backend, dtype, as_ones) if is_users_own(each) else each
            for kind, each in mask.items()
        }
    if not isinstance(mask, Tensor):
        if backend != "flex":
            raise AttentionMaskError(f"a BlockMask is for FlexAttention, and the model runs on {backend}: give a 2D mask")
        return mask
    _check(mask, batch, length, heads, backend)
    # Until 4.42, ones and zeros were the only 4D form, so a floating point mask with a value above 0 is that.
    if READY_MASKS_ARE_INVERTED and mask.is_floating_point() and not mask.is_meta and bool((mask > 0).any()):
        mask = mask > 0
    if as_ones:
        mask = (mask if mask.dtype == torch.bool else mask >= 0).to(dtype)
    elif mask.dtype == torch.bool and not (backend == "sdpa" and HAS_MASKING_UTILS):
        mask = additive(mask, dtype)
    return mask if spans == 1 else mask.repeat(1, spans, 1, 1)


def _check_values(masks: dict[str, Any], backend: Backend) -> None:
    for kind, mask in masks.items():
        # transformers' own functions make 2D masks for FlashAttention.
        if not (mask is None or is_users_own(mask) or (backend == "flash" and isinstance(mask, Tensor))):
            what = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise AttentionMaskError(f"attention_mask holds {what} for {kind!r}: give a ready 4D mask, or None")


def _check(mask: Tensor, batch: int, length: int, heads: int, backend: Backend) -> None:
    rows, channels, queries, keys = mask.shape
    if rows not in (1, batch) or channels not in (1, heads) or queries not in (1, length) or keys != length:
        raise AttentionMaskError(
            f"a ready 4D attention_mask of shape {tuple(mask.shape)} for input of {batch} x {length} tokens: give "
            f"({batch}, 1, {length}, {length}), with {heads} instead of the 1 for one mask per head, or the 2D mask "
            f"({batch}, {length}). If a model around this one made the mask, call enable_bidirectional on that model"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AttentionMaskError(
            f"a ready 4D attention_mask of dtype {mask.dtype}: give bool, True where visible, or floating point, which is added "
            "to the scores (0 where visible)"
        )
    check_readable("attention_mask", mask, mask.device)
    if mask.is_floating_point() and mask.numel() and not (mask.is_meta or values_are_unknown()):
        _check_additive(mask)
    if backend == "flash":
        raise AttentionMaskError(
            f"FlashAttention takes no ready 4D attention_mask, and got one of shape {tuple(mask.shape)}: give the 2D mask, and "
            "position_ids for packed sequences, or use attn_implementation='sdpa'"
        )


def _check_additive(mask: Tensor) -> None:
    """Raise AttentionMaskError if an additive mask can't mean what it says. One look at its extremes for a mask up to 0."""
    low, high = torch.stack(torch.aminmax(mask)).tolist()
    if high <= 0:  # as masks are; false for NaN
        return
    if not high < torch.inf:
        raise AttentionMaskError(
            f"a ready 4D attention_mask of {mask.dtype} holds NaN or +inf, which would make every score NaN: give 0 where "
            "visible and torch.finfo(dtype).min where hidden"
        )
    if (low, high) == (0, 1) and not READY_MASKS_ARE_INVERTED and bool(((mask == 0) | (mask == 1)).all()):
        raise AttentionMaskError(
            f"a ready 4D attention_mask of {mask.dtype} holds ones and zeros, which would be added to the scores and hide "
            "nothing: give bool, True where visible, or 0 where visible and torch.finfo(dtype).min where hidden"
        )
