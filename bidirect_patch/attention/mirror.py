"""What a family holds of its own for the past, mirrored into the future.

Most models get their causality from one mask, which `masks.py` replaces. Some keep it elsewhere: a triangular buffer
(openai-gpt, gpt_neo), an ALiBi bias that grows with the key's position (bloom, falcon, mpt), mask code that accepts no
ready mask (the same three). One rule covers them: two positions see each other as the later one saw the earlier.

And some compare positions (MiniMax-M3's indexer): `Sight` answers them.
"""

from typing import Any

import torch
from torch import Tensor, nn


def triangular_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that are causal masks: square in the last two dims, True on and not above the diagonal."""
    return {n: b for n, b in module._buffers.items() if b is not None and _is_causal_mask(b)}


def _is_causal_mask(buffer: Tensor) -> bool:
    shape = buffer.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2 or buffer.numel() != shape[-1] ** 2:
        return False
    if buffer.is_meta:  # values can't be read; a square of its own size is nothing else in an attention module
        return True
    square = buffer.reshape(shape[-2:]) != 0
    return bool(square.diagonal().all()) and not bool(square.triu(1).any())


def is_banded(buffer: Tensor) -> bool:
    """Whether a causal mask buffer hides the distant past too: a window."""
    return not buffer.is_meta and not bool(buffer[..., -1, 0].all())


def mirrored_buffer(buffer: Tensor) -> Tensor:
    """A causal mask buffer (..., n, n) united with its transpose; same dtype and shape."""
    return torch.maximum(buffer, buffer.transpose(-1, -2)) if buffer.dtype != torch.bool else buffer | buffer.mT


def mirrored_bias(bias: Tensor, length: int) -> Tensor:
    """ALiBi (..., 1, keys), linear in the key's position, as -slope * |q - k|: (..., length, length).

    Under a causal mask softmax ignores the part that all keys share, so slope * k stands for slope * (k - q).
    """
    at = bias[..., 0, -length:]
    return -(at[..., None, :] - at[..., :, None]).abs()


def mirrored_mask(mask: Any, hides: bool = False) -> Any:
    """A causal mask (batch, 1 or heads, n, n), bool or additive and then maybe with ALiBi in it, or a BlockMask, mirrored.

    Or a dict of such. hides: a bool mask is True where a position is hidden, not where it is seen. A key that doesn't see
    itself is padding. Rows of padded queries see every real key. Columns past the last key are cut off. Any other shape
    is padding alone, and is left as it is.
    """
    if isinstance(mask, dict):
        return {kind: mirrored_mask(each, hides) for kind, each in mask.items()}
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _mirrored_block_mask(mask)
    if mask.dim() < 3 or mask.shape[-1] < mask.shape[-2] or mask.shape[-2] == 1:
        return mask
    mask = mask[..., : mask.shape[-2]]
    if mask.dtype == torch.bool:
        seen = mask ^ hides
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2
    real = seen.diagonal(dim1=-2, dim2=-1)
    both = ((seen | seen.mT) | ~real[..., :, None]) & real[..., None, :]
    both = both | ~real.any(-1)[..., None, None]
    if mask.dtype == torch.bool:
        return both ^ hides
    bias = mask.diagonal(dim1=-2, dim2=-1).masked_fill(~real, 0)
    bias = -(bias[..., None, :] - bias[..., :, None]).abs()
    return torch.where(both, bias, torch.finfo(mask.dtype).min)


def _mirrored_block_mask(mask: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    if not hasattr(mask, "mirrored"):  # the layers of one forward share it
        batch, heads, queries, keys = mask.shape
        device = mask.kv_num_blocks.device
        dense = mirrored_mask(create_mask(mask.mask_mod, batch, heads, queries, keys, device))
        one = torch.zeros((), dtype=torch.int64, device=device)  # index of an axis that all share

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return dense[b if batch > 1 else one, h if heads > 1 else one, q, k]

        mask.mirrored = create_block_mask(visible, batch, heads, queries, keys, device)
    return mask.mirrored


class Sight(Tensor):
    """Positions of queries, int64 (batch, n), that answer "which keys are later?" with those that are out of sight.

    For parts of an attention module that look for the keys they may choose from by comparing positions, and so see
    neither the mask nor its padding and documents. Compared with positions of keys (..., 1, n), positions (..., n, 1) give
    what `hidden` says; in all else they are plain positions.
    """

    hidden: Tensor  # bool (batch, n, n): query, key

    @classmethod
    def of(cls, mask: Tensor) -> "Sight":
        """What a mask (batch, 1, n, n), bool or additive, leaves to see."""
        hidden = ~mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] < 0
        return cls._looking(torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape[0], -1), hidden)

    @classmethod
    def _looking(cls, positions: Tensor, hidden: Tensor) -> "Sight":
        sight = positions.as_subclass(cls)
        sight.hidden = hidden
        return sight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor) or type(args[0]) is type(args[-1]) and len(args) == 2:
                return out
            sight = next(a for a in args if isinstance(a, cls))
            name = func.__name__.strip("_")
            if name in ("getitem", "unsqueeze", "expand"):
                return cls._looking(out, sight.hidden)
            later = ("gt", "le") if sight is args[-1] else ("lt", "ge")  # key > query, or query < key; and the opposites
            if name not in later or out.shape[-2:] != sight.hidden.shape[-2:]:
                return out
            hidden = sight.hidden.unflatten(0, (-1, *[1] * (out.dim() - 3))).expand(out.shape)
            return hidden if name == later[0] else ~hidden
