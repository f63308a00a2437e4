"""Positions for parts of an attention module that find the past by comparing positions (MiniMax-M3's indexer)."""

import torch
from torch import Tensor


class MaskedPositions(Tensor):
    """Positions of queries, int64 (batch, n), that answer "which keys are later?" with the keys that are hidden.

    A part that picks keys by comparing positions sees neither the mask nor its padding and packed sequences. Compared with
    positions of keys (..., 1, n), positions (..., n, 1) give what `hidden` says; in all else they are plain positions.
    """

    hidden: Tensor  # bool (batch, n, n): query, key

    @classmethod
    def of(cls, mask: Tensor) -> "MaskedPositions":
        """Positions that hide what a mask (batch, 1, n, n), bool or additive, hides."""
        hidden = ~mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] < 0
        return cls._with(torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape[0], -1), hidden)

    @classmethod
    def _with(cls, positions: Tensor, hidden: Tensor) -> "MaskedPositions":
        masked = positions.as_subclass(cls)
        masked.hidden = hidden
        return masked

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor) or type(args[0]) is type(args[-1]) and len(args) == 2:
                return out
            masked = next(a for a in args if isinstance(a, cls))
            name = func.__name__.strip("_")
            if name in ("getitem", "unsqueeze", "expand"):
                return cls._with(out, masked.hidden)
            later = ("gt", "le") if masked is args[-1] else ("lt", "ge")  # key > query, or query < key; and the opposites
            if name not in later or out.shape[-2:] != masked.hidden.shape[-2:]:
                return out
            hidden = masked.hidden.unflatten(0, (-1, *[1] * (out.dim() - 3))).expand(out.shape)
            return hidden if name == later[0] else ~hidden
