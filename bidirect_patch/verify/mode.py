"""Whether a decoder is what it says: the patch is on, and nobody has changed the code since it was seen at work."""

from torch import nn

from ..attention.mixed import check_decoder
from ..errors import UnsupportedModelError
from ..model.config import is_known_kernel, kernel_of, text_config
from ..model.decoder import Decoder
from ..model.find import decoders
from ..model.sinks import NO_SINKS, Sinks
from ..model.walk import modules_of
from ..swap.record import record_of, setting_of
from .proof import native_attention


def is_verified_patch(decoder: Decoder) -> bool:
    """Whether a decoder is patched, by code that nobody has changed since it was verified, where it was."""
    if not decoder.is_patched:
        return False
    code = decoder.code
    if code is None:
        return True
    configs = {id(config): config for module in decoder.modules if (config := getattr(module, "config", None)) is not None}
    kernels = {kernel_of(text_config(config)) for config in configs.values()}
    return code.is_same() and all(is_known_kernel(kernel, code.kernel) for kernel in kernels)


def attends_both_ways(decoder: Decoder) -> bool:
    """Whether every layer of the decoder attends in both directions, by the patch or by its config."""
    if decoder.refusals:
        return False
    return is_verified_patch(decoder) or (not decoder.has_any_patch and native_attention(decoder) == "bidirectional")


def is_bidirectional(model: nn.Module, sinks: Sinks | None = None) -> bool:
    """Whether every decoder in `model` attends in both directions, and with `sinks` if given; False where there is none."""
    try:
        found = decoders(model)
    except UnsupportedModelError:
        return False
    return all(map(attends_both_ways, found)) and (sinks is None or all(decoder.setting.sinks == sinks for decoder in found))


def sinks_in(model: nn.Module) -> Sinks:
    """The sinks of the first patched decoder in `model` that has some; none if none has any."""
    settings = filter(None, map(setting_of, modules_of(model)))
    return next((Sinks(*setting.sinks) for setting in settings if setting.sinks != NO_SINKS), NO_SINKS)


def check_not_mixed(model: nn.Module) -> None:
    """Raise OrderError if some attention modules of a decoder in `model` are bidirectional and others are not."""
    if any(record_of(module) is not None for module in modules_of(model)):
        for decoder in decoders(model):
            check_decoder(decoder)
