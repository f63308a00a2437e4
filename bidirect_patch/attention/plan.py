"""What each module of a decoder gets, or why its backend can't give that (windows, sinks). Nothing is changed here."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import OrderError, UnsupportedModelError
from ..model.buffers import is_banded
from ..model.code import Code
from ..model.config import ConfigView, text_config
from ..model.decoder import Attention, Decoder, Part
from ..model.facts import mask_parameter, parameter_names
from ..model.walk import modules_of
from ..model.windows import Span
from ..swap.classes import Swapped
from ..swap.modes import Mode, Setting
from ..swap.record import Plan, own_before_patch
from .attention_forward import BidirectionalAttention, BidirectionalPart
from .handling import MaskHandling, possible_handlings
from .mirror import mirrored_buffer
from .model_forward import BidirectionalModel, CausalBlock, WithoutCache
from .module_settings import AttentionSettings, ModelSettings
from .old_releases import shorter_window
from .versions import FLASH_WINDOW_IS_INCLUSIVE, SEE_ALL_WITHOUT_MASK


def bidirectional_plans(
    decoder: Decoder, handling: MaskHandling | None = None, code: Code | None = None
) -> Iterator[tuple[nn.Module, Plan]]:
    """The plan of every module that has to change for `decoder` to be bidirectional.

    Args:
        decoder: with the sinks that it is to have.
        handling: how its mask code takes a mask; None for what is likeliest.
        code: the code with which its class was seen to become bidirectional; None if that was not seen.

    Raises:
        UnsupportedModelError: a window that the backend would not be given.
        OrderError: a causal mask in a buffer on the meta device, whose values can't be mirrored.
    """
    spans, handling = decoder.spans, handling or possible_handlings(decoder)[0]
    config, is_flash = decoder.config, decoder.backend == "flash"
    for attention in decoder.attentions:
        itself, *inside = attention.parts
        yield itself.module, _attention_plan(attention, itself, inside, spans, config, is_flash, handling)
        for part in inside:
            if part.causal_flags or part.causal_buffers:
                yield part.module, Plan(BidirectionalPart, None, _not_causal(part), _mirrored(part))
    setting = Setting(Mode.BIDIRECTIONAL, decoder.sinks)
    for part, name in zip(map(Part, decoder.mask_makers), decoder.names_in_makers):
        settings = ModelSettings(
            spans=spans,
            handling=handling,
            code=code,
            has_outer_maker=part.module is not decoder.outermost,
            decoder=name,
            places=decoder.places if part.module is decoder.module else (),
            config_is_causal=getattr(part.config, "is_causal", None) is True,
        )
        yield part.module, Plan(BidirectionalModel, settings, _not_causal(part), _mirrored(part), setting)
    for module in decoder.cache_makers:
        yield module, Plan(WithoutCache)


def causal_block_plans(model: nn.Module, decoder: Decoder, is_native: bool) -> Iterator[tuple[nn.Module, Plan]]:
    """The plan of every module that has to change for a bidirectional `decoder` to be causal within a block.

    Args:
        model: that the decoder is in.
        decoder: which the block is for.
        is_native: whether it is bidirectional by its config, wholly or in part.

    Raises:
        OrderError: the model is bidirectional by its config, and in a way that no block can change.
    """
    config: Any = decoder.module.config
    views: dict[str, Any] = {}
    if is_native:
        if decoder.builders or config is not text_config(config) or getattr(config, "is_causal", True) is not False:
            raise OrderError(
                f"{type(decoder.module).__name__} is bidirectional by its config, which also decides how its layers are built or "
                "is read by the model around it, so that no block can make it causal: load it with is_causal=True (Gemma: "
                "use_bidirectional_attention=False) in its text config, then enable_bidirectional"
            )
        views = {"config": ConfigView(config, is_causal=True)}
        for module in modules_of(model):
            if own_before_patch(module, "config") is config and module is not decoder.module:
                yield module, Plan(_WithConfig, None, views)
    yield decoder.module, Plan(CausalBlock, None, views, setting=Setting(Mode.CAUSAL_BLOCK))


class _WithConfig(Swapped):
    """A module whose config is replaced within a causal block."""

    rank = 1


# The mixins that these plans put on an attention module and the modules in it.
OF_ATTENTION: tuple[type[Swapped], ...] = (BidirectionalAttention, BidirectionalPart)

# Every mixin that these plans put on a module.
MIXINS: tuple[type[Swapped], ...] = (
    BidirectionalModel,
    *OF_ATTENTION,
    CausalBlock,
    WithoutCache,
    _WithConfig,
)


def _not_causal(part: Part) -> dict[str, Any]:
    return dict.fromkeys(part.causal_flags, False)


def _mirrored(part: Part) -> dict[str, Tensor]:
    if any(buffer.is_meta for buffer in part.causal_buffers.values()):
        raise OrderError(f"{part.cls.__name__} keeps its causal mask in a buffer, which is on meta: load the model first")
    return {name: mirrored_buffer(buffer) for name, buffer in part.causal_buffers.items()}


def _attention_plan(
    attention: Attention,
    itself: Part,
    inside: list[Part],
    spans: tuple[Span, ...],
    config: Any,
    is_flash: bool,
    handling: MaskHandling,
) -> Plan:
    module, span = attention.module, attention.span
    windows = [part for part in (itself, *inside) if any(map(is_banded, part.causal_buffers.values()))]
    if windows and is_flash:
        raise UnsupportedModelError(
            f"{windows[0].cls.__name__} keeps its layer's window in a buffer, which transformers doesn't hand to "
            "FlashAttention: it would see everything. Use attn_implementation='eager'"
        )
    if span.sinks and is_flash and getattr(module, "is_kv_shared_layer", False):
        raise UnsupportedModelError(
            f"{attention.path} {type(module).__name__} takes its keys from another layer, which can't be run again on sink "
            "tokens alone, as FlashAttention needs it: use attn_implementation='sdpa' or 'eager', or num_sink_tokens=0"
        )
    # A part that reads the mask too, or compares positions (a sparse attention's indexer), can't do without one.
    classes = [part.cls for part in inside if part.has_weights]
    reads = any(map(mask_parameter, classes))
    compares = not reads and any("position_ids" in parameter_names(cls) for cls in classes)
    omits = () if reads or compares or not handling.sees_all_without_mask else SEE_ALL_WITHOUT_MASK
    settings = AttentionSettings(
        span=span,
        index=spans.index(span),
        spans=len(spans),
        config=config,
        handling=handling,
        omits_mask_on=omits,
        needs_shorter_window=span.window is not None and FLASH_WINDOW_IS_INCLUSIVE and not is_flash,
        compares_positions=compares,
    )
    attributes: dict[str, Any] = {"is_causal": False, **_not_causal(itself)}
    if is_flash and FLASH_WINDOW_IS_INCLUSIVE:
        attributes |= shorter_window(itself, span)
    return Plan(BidirectionalAttention, settings, attributes, _mirrored(itself))
