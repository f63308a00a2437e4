"""A warning where a bidirectional model is handed a ready mask that makes it causal.

A ready mask is followed as it is. A model around the patched one makes such a mask for it, and makes it causal where only the
inner model was enabled: the text model of a multimodal one, say. It may open the tokens of an image to each other.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import CausalMaskWarning, warn_user
from ..model.facts import forward_builds_mask
from ..model.under_way import models_under_way
from ..swap.classes import is_open, original
from ..swap.recording import values_are_unknown

_warned: "WeakSet[nn.Module]" = WeakSet()
_judged_by_block_mask: "WeakSet[nn.Module]" = WeakSet()  # which has to be written out, so that the first one decides


def warn_if_causal(model: nn.Module, mask: Any) -> None:
    """Warn, once per model, if a ready mask lets tokens see earlier ones and no later one, though later ones see them.

    Of most masks the two diagonals beside the main one say that it isn't so, and no more is read.

    Args:
        model: to whose patched forward the mask was given.
        mask: (batch, heads, length, length), bool (True is visible) or additive; a BlockMask; or a dict of such by kind of layer.
    """
    if values_are_unknown() or model in _warned:
        return
    by_kind = mask if isinstance(mask, dict) else {"": mask}
    if any(map(_is_block_mask, by_kind.values())):
        if model in _judged_by_block_mask:
            return
        _judged_by_block_mask.add(model)
    given = {kind: each for kind, mask in by_kind.items() if (each := _square(mask)) is not None}
    seen = {kind: _visible(each) for kind, each in given.items() if _may_be_causal(each)}
    if not seen:
        return
    enough = 0 if _is_made_outside(model) else 1  # who gives a mask by hand may want some tokens to be causal
    shares = {kind: share for kind, each in seen.items() if (share := causal_share(each)) and share >= enough}
    if not shares:
        return
    _warned.add(model)
    kinds = ", ".join(filter(None, shares))
    share = max(shares.values())
    tokens = "no token sees a later one" if share == 1 else f"{share:.0%} of the tokens see no later one"
    where = f" in its layers of {kinds}" if kinds else ""
    result = "these are" if kinds or share < 1 else "its result is"
    warn_user(
        f"{type(model).__name__} attends in both directions and was given a ready attention mask in which {tokens}{where}, so "
        f"that {result} causal. If a model around it made that mask, call enable_bidirectional on that model; if you want a "
        "causal result, use `with bidirectional(model, enabled=False):`",
        CausalMaskWarning,
    )


def _is_made_outside(model: nn.Module) -> bool:
    """Whether a mask was made by a model around this one, which the patch isn't on."""
    return any(
        each is not model and not is_open(each) and forward_builds_mask(original(type(each))) for each in models_under_way()
    )


def causal_share(seen: Tensor) -> float:
    """Which share of the tokens that later ones see are causal, and see none of those; 0 if only sink tokens do.

    Sink tokens are causal too; but few, and not among tokens that see both sides, as a text behind an image is.

    Args:
        seen: (batch, heads, length, length), bool, who sees whom.
    """
    earlier = seen.tril(-1)
    is_seen, sees_later = earlier.any(-2), seen.triu(1).any(-1)  # by a later token; some later token
    causal, open_ = is_seen & ~sees_later, is_seen & sees_later
    among_open = causal & (earlier & open_[..., None, :]).any(-1)
    if not (among_open.any() or causal.sum() > open_.sum()):
        return 0.0
    return float(causal.sum() / is_seen.sum())


def _may_be_causal(mask: Tensor) -> bool:
    """Whether a token is seen by the one behind it, and doesn't see that one."""
    return bool((_visible(mask.diagonal(-1, -2, -1)) & ~_visible(mask.diagonal(1, -2, -1))).any())


def _is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask"


def _visible(mask: Tensor) -> Tensor:
    """A mask, bool or additive, or a part of one, as bool: True where visible."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _square(mask: Any) -> Tensor | None:
    """(batch, heads, length, length), bool or additive: a square mask whose values can be read; None for another."""
    if _is_block_mask(mask):
        from torch.nn.attention.flex_attention import create_mask

        batch, heads, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, mask.kv_num_blocks.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.is_meta or mask.shape[-1] != mask.shape[-2]:
        return None
    return mask
