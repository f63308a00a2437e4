"""Masks for eager and SDPA: a tensor (batch, spans, query, key), one channel per span of the decoder's layers.

A mask that hides nothing has stride 0 in every dim, so that it takes no memory; `hides_nothing` tells.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..model.windows import Span
from .padding_and_packing import Sequences
from .versions import HAS_MASKING_UTILS


def dense_mask(
    sequences: Sequences, spans: tuple[Span, ...], dtype: torch.dtype, as_bool: bool, ones_and_zeros: bool
) -> Tensor:
    """(batch, spans, query, key): bool, True where visible; or additive, 0 and the dtype's minimum; or ones and zeros."""
    as_bool = as_bool and HAS_MASKING_UTILS and not ones_and_zeros
    if sequences.hide_nothing(spans):
        kind = torch.bool if as_bool else dtype
        value = torch.full((), 1 if as_bool or ones_and_zeros else 0, dtype=kind, device=sequences.device)
        return value.expand(sequences.batch, len(spans), sequences.length, sequences.length)
    all_alike = sequences.real is None and sequences.number is None
    rows = replace(sequences, batch=1) if all_alike else sequences
    mask = torch.stack([rows.visible(span) for span in spans], 1)
    if not as_bool:
        mask = mask.to(dtype) if ones_and_zeros else additive(mask, dtype)
    return mask.expand(sequences.batch, -1, -1, -1)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where visible, as 0 and the minimum of `dtype`."""
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min)


def hides_nothing(mask: Tensor) -> bool:
    """Whether `dense_mask` made this mask, or a channel of it, as one value for all."""
    return not any(mask.stride())
