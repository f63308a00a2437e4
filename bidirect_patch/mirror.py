"""What a family holds of its own for the past, mirrored into the future.

Most models get their causality from one mask, which `masks.py` replaces. Some keep it elsewhere: a triangular buffer
(openai-gpt, gpt_neo), an ALiBi bias that grows with the key's position (bloom, falcon, mpt), mask code that accepts no
ready mask (the same three). One rule covers them: two positions see each other as the later one saw the earlier.
"""

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


def mirrored_buffer(buffer: Tensor) -> Tensor:
    """A causal mask buffer (..., n, n) united with its transpose; same dtype and shape."""
    return torch.maximum(buffer, buffer.transpose(-1, -2)) if buffer.dtype != torch.bool else buffer | buffer.mT


def mirrored_bias(bias: Tensor, length: int) -> Tensor:
    """ALiBi (..., 1, keys), linear in the key's position, as -slope * |q - k|: (..., length, length).

    Under a causal mask softmax ignores the part that all keys share, so slope * k stands for slope * (k - q).
    """
    at = bias[..., 0, -length:]
    return -(at[..., None, :] - at[..., :, None]).abs()


def mirrored_mask(mask: Tensor) -> Tensor:
    """A causal mask (batch, 1 or heads, n, n), bool or additive and then maybe with ALiBi in it, mirrored.

    A key that doesn't see itself is padding. Rows of padded queries see every real key.
    """
    if mask.shape[-1] != mask.shape[-2]:
        return mask  # padding alone, (batch, 1, 1, n): nothing causal in it
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = seen.diagonal(dim1=-2, dim2=-1)
    both = ((seen | seen.mT) | ~real[..., :, None]) & real[..., None, :]
    both = both | ~real.any(-1)[..., None, None]
    if mask.dtype == torch.bool:
        return both
    bias = mask.diagonal(dim1=-2, dim2=-1).masked_fill(~real, 0)
    bias = -(bias[..., None, :] - bias[..., :, None]).abs()
    return torch.where(both, bias, torch.finfo(mask.dtype).min)
