"""Causal masks that a module keeps as a buffer (GPT-2 on old releases, GPT-Neo), not as an argument."""

from torch import Tensor, nn

from ..swap.record import buffers_before_patch


def triangular_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that are causal masks, as they are without the patch.

    A causal mask is square in its last two dims, nonzero on the diagonal and zero above it.
    """
    return {n: b for n, b in buffers_before_patch(module).items() if b is not None and _is_causal_mask(b)}


def _is_causal_mask(buffer: Tensor) -> bool:
    shape = buffer.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2 or buffer.numel() != shape[-1] ** 2:
        return False
    if buffer.is_meta:  # without values; in an attention module, such a square is nothing else
        return True
    square = buffer.reshape(shape[-2:]) != 0
    return bool(square.diagonal().all()) and not bool(square.triu(1).any())


def is_banded(buffer: Tensor) -> bool:
    """Whether a causal mask buffer also hides the distant past: a window."""
    return not buffer.is_meta and not bool(buffer[..., -1, 0].all())
