"""In which mode a decoder is now, read from every module that decides it."""

from torch import nn

from ..attention.attention_forward import BidirectionalAttention
from ..attention.mixed import check_decoder
from ..attention.model_forward import BidirectionalModel, CausalBlock, ModelSettings
from ..model.find import Decoder, decoders, with_sinks_as_far_as_layers_go
from ..model.sinks import NO_SINKS, Sinks
from ..model.walk import modules_of
from ..swap.classes import Swapped, has_mixin
from ..swap.instance_forward import calls_the_patch
from ..swap.modes import Mode, Setting
from ..swap.plan import record_of, settings_of
from .verify import is_still_verified, native_attention


def setting_of(decoder: Decoder) -> Setting:
    """The mode of a decoder, and its sinks."""
    if is_in_block(decoder):
        mode = Mode.CAUSAL_BLOCK
    elif is_patched(decoder):
        mode = settings_of(decoder.outermost, Mode) or Mode.BIDIRECTIONAL
    else:
        mode = Mode.AS_LOADED
    return Setting(mode, sinks_of(decoder))


def is_in_block(decoder: Decoder) -> bool:
    """Whether a decoder is inside a causal block, opened by any thread."""
    return has_mixin(decoder.module, CausalBlock)


def is_patched(decoder: Decoder) -> bool:
    """Whether every model that makes the mask and every attention module has the patch, and a call of each runs it."""
    return all(_has(module, BidirectionalModel) for module in decoder.mask_makers) and all(
        _has(attention.module, BidirectionalAttention) for attention in decoder.attentions
    )


def is_verified_patch(decoder: Decoder) -> bool:
    """`is_patched`, by code that nobody has changed since it was verified."""
    return is_patched(decoder) and is_still_verified(as_patched(decoder))


def has_any_patch(decoder: Decoder) -> bool:
    """Whether any module of the decoder has a part of the patch."""
    return any(record_of(module) is not None for module in decoder.modules)


def attends_both_ways(decoder: Decoder) -> bool:
    """Whether every layer of the decoder attends in both directions, by the patch or by its config."""
    if decoder.unsupported_layers:
        return False
    return is_verified_patch(decoder) or (not has_any_patch(decoder) and native_attention(decoder) == "bidirectional")


def sinks_of(decoder: Decoder) -> Sinks:
    """The sinks that a patched decoder has now; none for one that is not patched."""
    settings = settings_of(decoder.module, ModelSettings)
    return NO_SINKS if settings is None else settings.sinks


def sinks_in(model: nn.Module) -> Sinks:
    """The sinks of the first patched decoder in `model` that has some; none if none has any."""
    found = (settings_of(module, ModelSettings) for module in modules_of(model))
    return next((s.sinks for s in found if s is not None and s.sinks != NO_SINKS), NO_SINKS)


def as_patched(decoder: Decoder) -> Decoder:
    """A patched decoder with the sinks that it has."""
    return with_sinks_as_far_as_layers_go(decoder, sinks_of(decoder))


def check_not_mixed(model: nn.Module) -> None:
    """Raise OrderError if some attention modules of a decoder in `model` are bidirectional and others are not."""
    if any(record_of(module) is not None for module in modules_of(model)):
        for decoder in decoders(model):
            check_decoder(decoder)


def _has(module: nn.Module, mixin: type[Swapped]) -> bool:
    return has_mixin(module, mixin) and calls_the_patch(module)
