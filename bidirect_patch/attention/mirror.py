"""Turn a causal mask or bias that a model makes itself into a symmetric one.

Most models are causal by one mask, which `ready_mask` replaces. Some keep it elsewhere: a triangular buffer (openai-gpt,
gpt_neo), an ALiBi bias that grows with the key's position (bloom, falcon, mpt), mask code that takes no ready mask. One rule
covers them: two positions see each other as the later one saw the earlier. A mask without ALiBi that is mirrored already stays
as it is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..model.windows import Span
from .padding_and_packing import past_sinks, with_padding


def mirrored_buffer(buffer: Tensor) -> Tensor:
    """A causal mask buffer (..., n, n) united with its transpose; same dtype and shape."""
    with torch.inference_mode(False):  # or a model that is enabled in inference mode could not be trained
        return torch.maximum(buffer, buffer.transpose(-1, -2)) if buffer.dtype != torch.bool else buffer | buffer.mT


def mirrored_bias(bias: Tensor, length: int) -> Tensor:
    """ALiBi (..., 1, keys), linear in the key's position, as -slope * |q - k|: (..., length, length).

    Under a causal mask softmax ignores the part that all keys share, so slope * k stands for slope * (k - q).
    """
    return _falling(bias[..., 0, -length:])


def mirrored_mask(mask: Any, true_hides: bool = False, span: Span = Span()) -> Any:
    """A causal mask, mirrored.

    A key that doesn't see itself is padding. Columns past the last query are cut off. A mask of another shape is for padding
    alone, and is returned as it is, but with sink tokens. A row of a bool mask in which something is seen, but no key sees
    itself, is read the wrong way round: it stays causal, so that the check of a small model sees it.

    Args:
        mask: (batch, 1 or heads, n, n or more), bool or additive, which may hold ALiBi; or a BlockMask; or a dict of such.
        true_hides: whether a bool mask is True where a position is hidden.
        span: of the layer, whose sink tokens stay causal.
    """
    if isinstance(mask, dict):
        return {kind: mirrored_mask(each, true_hides, span) for kind, each in mask.items()}
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _mirrored_block_mask(mask, span)
    if mask.dim() == 2 and span.sinks:  # XLM's, for padding: (batch, n), 1 where real
        mask = mask[:, None].to(torch.bool)
    if mask.dim() < 3 or mask.shape[-1] < mask.shape[-2]:
        return mask
    if mask.shape[-2] == 1:
        if not span.sinks or mask.shape[-1] == 1:
            return mask
        mask = mask.expand(*mask.shape[:-2], mask.shape[-1], mask.shape[-1])
    mask = mask[..., : mask.shape[-2]]
    is_bool = mask.dtype == torch.bool
    seen = (~mask if true_hides else mask) if is_bool else mask > torch.finfo(mask.dtype).min / 2
    real = seen.diagonal(dim1=-2, dim2=-1)
    both = seen | seen.mT
    if span.sinks:
        both = both & past_sinks(real & (real.cumsum(-1) <= span.sinks), span.sees_sinks)
    any_real = real.any(-1)[..., None, None]
    both = with_padding(both, real[..., :, None], real[..., None, :], any_real)
    if is_bool:
        both = torch.where(any_real | ~seen.flatten(-2).any(-1)[..., None, None], both, seen)
        return ~both if true_hides else both  # not ^: a trace can't record it with a Python bool
    bias = _falling(mask.diagonal(dim1=-2, dim2=-1).masked_fill(~real, 0))
    return torch.where(both, bias, torch.finfo(mask.dtype).min)


def _falling(values: Tensor) -> Tensor:
    """(..., n) -> (..., n, n), minus how far the values at two positions are apart."""
    return -(values[..., None, :] - values[..., :, None]).abs()


_mirrored: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by BlockMask of the model's own, then by span


def _mirrored_block_mask(mask: Any, span: Span) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    known = _mirrored.setdefault(mask, {})  # the layers of one forward share it
    if span not in known:
        batch, heads, queries, keys = mask.shape
        device = mask.kv_num_blocks.device
        dense = mirrored_mask(create_mask(mask.mask_mod, batch, heads, queries, keys, device), span=span)
        one = torch.zeros((), dtype=torch.int64, device=device)  # index of an axis that all share

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return dense[b if batch > 1 else one, h if heads > 1 else one, q, k]

        known[span] = create_block_mask(visible, batch, heads, queries, keys, device)
    return known[span]
