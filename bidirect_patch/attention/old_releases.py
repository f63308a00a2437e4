"""What only older releases of transformers need, each with the release up to which. Once that isn't supported, it goes.

What a release does differently with a mask stands in `versions`.
"""

from typing import Any

import torch
from torch import Tensor

from ..model.config import ConfigView
from ..model.decoder import Part
from ..model.windows import Span
from ..swap import in_use
from ..swap.classes import Swapped
from ..swap.record import settings_of
from .flash import how_to_run
from .module_settings import AttentionSettings, ModelSettings
from .versions import MAX_WINDOW_LAYERS_FOR_WINDOW


class LetsReadyMaskPass(Swapped):
    """Until 5.3, BERT and its kind make their mask in a method: a ready mask passes."""

    def get_extended_attention_mask(self, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the original has it."""
        if attention_mask.dim() == 4:
            return attention_mask
        return super().get_extended_attention_mask(attention_mask, *args, **kwargs)  # type: ignore[misc]  # the original's


def step_aside(cls: Any, original: Any) -> None:
    """Before 4.53 the mask code is a method of the model: it lets a ready mask pass. Later code does so by itself."""
    if not hasattr(original, "_update_causal_mask"):
        return

    def _update_causal_mask(self: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self, ModelSettings)
        is_ready = settings is not None and settings.handling.kind == "ready" and in_use.is_in_patched()
        if settings is not None and (is_ready or getattr(attention_mask, "ndim", 2) == 4):
            return attention_mask
        return original._update_causal_mask(self, attention_mask, *args, **kwargs)

    cls._update_causal_mask = _update_causal_mask


def shorter_window(attention: Part, span: Span) -> dict[str, Any]:
    """Until 4.56: what makes an attention module hand `|q - k| < window` to FlashAttention, in its own layers and no others."""
    shorter = None if span.window is None else span.window - 1
    if attention.own("sliding_window") is not None or "sliding_window" in attention.module.__dict__:
        return {} if span.window is None else {"sliding_window": shorter}
    if getattr(attention.config, "sliding_window", None) is None:
        return {}
    return {"config": ConfigView(attention.config, sliding_window=shorter, max_window_layers=MAX_WINDOW_LAYERS_FOR_WINDOW)}


def upad_input(self: Any, query: Any, key: Any, value: Any, attention_mask: Tensor, query_length: int) -> Any:
    """Until 4.43: boundaries of packed sequences, where transformers' own code knows only padding.

    Args:
        self: an attention module on FlashAttention.
        query: (batch, length, heads, width), as key and value.
        key: see query.
        value: see query.
        attention_mask: 2D for padding, which the original handles; else as `flash` makes it.
        query_length: of the query.
    """
    settings = settings_of(self, AttentionSettings)
    if attention_mask.dim() == 2 or settings is None:
        return self._original._upad_input(self, query, key, value, attention_mask, query_length)
    run = how_to_run(attention_mask, settings.index)
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    indices = torch.arange(query.shape[0] * query.shape[1], device=query.device)
    return *flat, indices, (run.cu_seq_lens,) * 2, (run.max_length,) * 2
