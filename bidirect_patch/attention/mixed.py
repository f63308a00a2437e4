"""Errors where a model that is bidirectional in part runs, generates or is saved.

It is so where a layer was taken out while the rest was undone and put back, where a copy of a layer was put into another model,
where two models share their layers, or where a layer was put in the place of one with other sink tokens. Or of a model and the
decoder inside it, for which the model makes the mask, only one was changed.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NoReturn

from torch import nn
from transformers import PreTrainedModel

from ..errors import OrderError
from ..model.decoder import Decoder
from ..model.facts import builds_causal_mask, forward_builds_mask, is_attention
from ..model.places import Channels, Place, attentions_in, fits_inside, names_of, out_of_place, spans_in, submodule
from ..model.sinks import sinks_of
from ..model.under_way import models_under_way
from ..model.walk import modules_of
from ..swap import in_use
from ..swap.classes import is_open, original
from ..swap.record import MISSING, changed_attributes, setting_of, settings_of
from ..swap.recording import is_graph_captured
from .recompute import check_checkpoints


def holds_open(model: nn.Module) -> bool:
    """Whether a decoder in `model` is bidirectional by the patch."""
    return any(isinstance(module, PreTrainedModel) and is_open(module) for module in modules_of(model))


def check_layers(model: nn.Module, places: Sequence[Place]) -> None:
    """Raise OrderError if a bidirectional model holds a layer that is not, or one that was made for another place.

    This walks no further than the model's layers.
    """
    layers = list(attentions_in(model, places))
    for module in chain.from_iterable(filter(None, layers)):
        if not is_open(module) and is_attention(module):
            _refuse(model, names_of(model, [module]), _otherwise(model), _A_LAYER)
    if moved := out_of_place(model, layers):
        _refuse(model, names_of(model, moved), _OUT_OF_PLACE, _A_LAYER)


def check_decoder_inside(maker: nn.Module) -> None:
    """Raise OrderError if a bidirectional model makes the mask of a decoder inside it that isn't, or has other sinks."""
    channels = settings_of(maker, Channels)
    if channels is None or fits_inside(maker):
        return
    decoder = submodule(maker, channels.decoder)
    assert decoder is not None  # it doesn't fit
    if spans_in(decoder) is not None:
        _refuse(maker, [channels.decoder], "has other sink tokens or windows than the model", _BY_ITSELF)
    if setting_of(decoder) is not None and not is_graph_captured():  # in a causal block, maybe of another thread
        in_use.check_caller(decoder)
    _refuse(maker, [channels.decoder], _otherwise(maker), _BY_ITSELF)


def decoder_inside(maker: nn.Module) -> nn.Module | None:
    """The decoder inside a bidirectional model that makes its mask; None for one that is the decoder itself."""
    channels = settings_of(maker, Channels)
    return submodule(maker, channels.decoder) if channels is not None and channels.decoder else None


def check_model_above(module: nn.Module) -> None:
    """Raise OrderError if a bidirectional attention module runs within a decoder that makes a causal mask for it.

    A forward that was taken before the patch runs within a decoder that is bidirectional by now; a layer by itself, in none.
    """
    model = next(models_under_way(), None)
    if model is None or all(each is not module for each in modules_of(model)):
        return
    if is_open(model):
        check_checkpoints(model)
    elif builds_causal_mask(original(type(model))):
        opened = [name for name, each in model.named_modules() if is_attention(each) and is_open(each)]
        _refuse(model, opened, _otherwise(model), _A_LAYER)


def is_run_again_in_its_model(module: nn.Module) -> bool:
    """Whether the backward pass that runs a module again runs all of its model, whose own forward makes the mask anew."""
    model = next(models_under_way(in_backward=True), None)
    return model is not None and any(each is module for each in modules_of(model))


def check_attributes(module: nn.Module) -> None:
    """Raise OrderError if somebody has changed what the patch set on a module or its children, such as `is_causal`."""
    for each in (module, *module._modules.values()):
        for name, value in ({} if each is None else changed_attributes(each)).items():
            raise OrderError(
                f"{type(each).__name__}.{name} was {'removed' if value is MISSING else f'set to {value!r}'} on a bidirectional "
                "model: call enable_bidirectional again, with the model's sink tokens if it has some, or disable_bidirectional"
            )


def check_model_around(decoder: nn.Module) -> None:
    """Raise OrderError if a bidirectional decoder runs within a model that makes a causal mask for other parts, and keeps that.

    For a decoder that was enabled by itself, and makes its own mask, in a model of transformers (Blt's patcher). Who wrote the
    model around it may want it so.
    """
    for model in models_under_way(making_masks=True):
        cls = original(type(model))
        if model is decoder or is_open(model) or not cls.__module__.startswith("transformers.") or not forward_builds_mask(cls):
            continue
        inside = set(modules_of(decoder))
        causal = [name for name, each in model.named_modules() if each not in inside and is_attention(each) and _is_causal(each)]
        if causal and decoder in set(modules_of(model)):
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in causal))
            why = f"since that was changed without the model around it, in which other parts stay causal ({parts})"
            _refuse(model, names_of(model, [decoder]), _otherwise(model), why)


def _is_causal(attention: nn.Module) -> bool:
    return not is_open(attention) and getattr(attention, "is_causal", None) is True


def has_maker_under_way(decoder: nn.Module) -> bool:
    """Whether a patched model runs now that makes the mask of the `decoder` inside it.

    Raises:
        OrderError: the decoder was changed by itself since the mask was made.
    """
    if is_graph_captured():
        return in_use.is_recorded_inside(decoder)
    maker = next((model for model in models_under_way() if decoder_inside(model) is decoder), None)
    if maker is not None:
        check_decoder_inside(maker)
    return maker is not None


def check_decoder(decoder: Decoder) -> None:
    """Raise OrderError unless a decoder, its attention modules and the models that make its mask are in one mode."""
    model = decoder.module
    if different := [each.path for each in decoder.attentions if is_open(each.module) != is_open(model)]:
        _refuse(model, different, _otherwise(model), _A_LAYER)
    if moved := decoder.out_of_place:
        _refuse(model, names_of(model, moved), _OUT_OF_PLACE, _A_LAYER)
    for maker in decoder.builders:
        check_decoder_inside(maker)
    for module in decoder.modules:
        check_attributes(module)


_OUT_OF_PLACE = "has other sink tokens or another window than its place in the model asks for"
_A_LAYER = "since a layer was put in or taken out, or belongs to another model too"
_BY_ITSELF = "since that was changed without the model around it, which makes its mask"


def _otherwise(model: nn.Module) -> str:
    """What to say of a part of `model` that attends otherwise."""
    return "isn't bidirectional, and the model is" if is_open(model) else "is bidirectional, and the model isn't"


def _refuse(model: nn.Module, names: Iterable[str], how: str, why: str) -> NoReturn:
    """Raise for parts of a model that don't attend as the model asks for."""
    raise OrderError(
        f"{original(type(model)).__name__}: {', '.join(names)} {how}, {why}: call {enabling(model)} or "
        "disable_bidirectional(model) again"
    )


def enabling(model: nn.Module) -> str:
    """The call that enables a model with the sinks that it has, for a message."""
    sinks = sinks_of(model)
    return f"enable_bidirectional(model, {sinks.in_words})" if any(sinks) else "enable_bidirectional(model)"
