"""What a layer's attention reaches: a sliding window, a chunk or no limit, and the sink tokens."""

from typing import Any, NamedTuple

from torch import nn

from ..swap.record import before_patch

# Kinds of layers whose window is over what they generate, in their KV cache: a text sees all of itself (Unlimited-OCR). A miss:
# the layer looks less far than in the causal model. A wrong match: it looks further.
_WINDOW_OF_CACHE = ("reference_sliding_attention",)


class Span(NamedTuple):
    """`window`: |q - k| < window. `chunk`: q // chunk == k // chunk, counted from the start of the sequence. None: no limit.

    `sinks`: how many tokens at the start of a sequence attend causally. `sees_sinks`: whether the other tokens attend to them.
    """

    window: int | None = None
    chunk: int | None = None
    sinks: int = 0
    sees_sinks: bool = True

    def hides_within(self, length: int) -> bool:
        """Whether the span hides any of `length` positions from another."""
        limit = self.limit
        return (limit is not None and limit < length) or (self.sinks > 0 and length > 1)

    @property
    def limit(self) -> int | None:
        """The smaller of the two limits, in tokens."""
        return min((limit for limit in (self.window, self.chunk) if limit is not None), default=None)

    @property
    def has_no_limit(self) -> bool:
        """Whether the span hides nothing, however long a sequence is."""
        return self.limit is None and not self.sinks


def span_of(attention: nn.Module, path: str, config: Any, reads_layer_kinds: bool) -> Span:
    """The span that a layer was trained with, read from where transformers keeps it.

    The layer's kind in `config.layer_types` says whether the layer has a window, where there is such a list and the model
    reads it. The size is the module's own `sliding_window`, else the config's.

    Args:
        attention: the layer's attention module.
        path: its name in the decoder, such as "layers.3.self_attn"; the first number in it is the layer's index where the
            module does not know its own.
        config: the decoder's config.
        reads_layer_kinds: whether the decoder's forward reads `config.layer_types`.
    """
    index = getattr(attention, "layer_idx", None)
    if index is None:
        digits = [step for step in path.split(".") if step.isdigit()]
        index = int(digits[0]) if digits else 0
    kinds = getattr(config, "layer_types", None) if reads_layer_kinds else None
    kind = kinds[index] if kinds and index < len(kinds) else None
    if kind is not None and "chunk" in kind:
        return Span(chunk=getattr(config, "attention_chunk_size", None))
    if kind == "full_attention" or kind in _WINDOW_OF_CACHE:
        return Span()
    own = before_patch(attention, "sliding_window")
    if own is not None or hasattr(attention, "sliding_window"):
        return Span(window=own)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return Span()
    if kind is not None:
        return Span(window=window if "sliding" in kind else None)
    if index < getattr(config, "max_window_layers", 0):  # as every release but 4.39 means it
        return Span()
    return Span(window=window)
