"""A warning where a bidirectional model is handed a ready mask that makes it causal.

A ready mask is followed as it is. A model around the patched one makes such a mask for it, and makes it causal where only the
inner model was enabled: the text model of a multimodal one, say.
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import CausalMaskWarning
from ..swap.recording import values_are_unknown

_judged: "WeakSet[nn.Module]" = WeakSet()


def warn_if_causal(model: nn.Module, mask: Any) -> None:
    """Warn, once per model, if a ready mask lets tokens see earlier ones and none a later one.

    The first mask that can tell decides; later ones cost nothing.

    Args:
        model: to whose patched forward the mask was given.
        mask: (batch, heads, length, length), bool (True is visible) or additive; a BlockMask; or a dict of such by kind of layer.
    """
    if values_are_unknown() or model in _judged:
        return
    for each in mask.values() if isinstance(mask, dict) else [mask]:
        seen = _visible(each)
        if seen is None or not seen.tril(-1).any():
            continue
        _judged.add(model)
        if not seen.triu(1).any():
            warnings.warn(
                f"{type(model).__name__} attends in both directions and was given a ready attention mask in which no token sees "
                "a later one, so that its result is causal. If a model around it made that mask, call enable_bidirectional on "
                "that model; if you want a causal result, use `with bidirectional(model, enabled=False):`",
                CausalMaskWarning,
                stacklevel=2,
            )
            return


def _visible(mask: Any) -> Tensor | None:
    """(batch, heads, length, length), True where visible, of a square mask whose values can be read."""
    if type(mask).__name__ == "BlockMask":
        from torch.nn.attention.flex_attention import create_mask

        batch, heads, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, mask.kv_num_blocks.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.is_meta or mask.shape[-1] != mask.shape[-2]:
        return None
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
