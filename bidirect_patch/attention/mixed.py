"""A model of which some attention modules are bidirectional and others are not: an error where it runs, generates or is saved.

A layer was taken out while the rest was undone and put back, a copy of a layer was put into another model, or two models share
their layers.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..errors import OrderError
from ..model.decoder import Decoder
from ..model.facts import builds_causal_mask
from ..model.find import is_attention
from ..model.walk import modules_of
from ..swap.classes import is_open, original


class Place(NamedTuple):
    """Where each layer of a decoder has an attention module: `layers` and `self_attn`, for example."""

    layers: str
    attention: str


def places(decoder: Decoder) -> tuple[Place, ...]:
    """Where the attention modules of a decoder stand in its layers."""
    pairs = ((each.layer.rpartition(".")[0], each.path[len(each.layer) + 1 :]) for each in decoder.attentions)
    return tuple(dict.fromkeys(Place(layers, attention) for layers, attention in pairs if layers and attention))


def holds_open(model: nn.Module) -> bool:
    """Whether a decoder in `model` is bidirectional by the patch."""
    return any(isinstance(module, PreTrainedModel) and is_open(module) for module in modules_of(model))


def check_layers(model: nn.Module, where: Iterable[Place]) -> None:
    """Raise OrderError if a bidirectional model holds a layer that is not, by walking no further than its layers."""
    for place in where:
        layers = _submodule(model, place.layers)
        for name, layer in ({} if layers is None else layers._modules).items():
            module = None if layer is None else _submodule(layer, place.attention)
            if module is not None and not is_open(module) and is_attention(module):
                _refuse(model, [f"{place.layers}.{name}.{place.attention}"])


def check_model_above(module: nn.Module) -> None:
    """Raise OrderError if a bidirectional attention module runs within a decoder that makes a causal mask for it.

    A forward that was taken before the patch runs within a decoder that is bidirectional by now; a layer by itself, in none.
    """
    model = next(models_under_way(), None)
    if model is None or is_open(model) or not builds_causal_mask(original(type(model))):
        return
    if any(each is module for each in modules_of(model)):
        _refuse(model, [name for name, each in model.named_modules() if is_attention(each) and is_open(each)])


def models_under_way() -> Iterator[PreTrainedModel]:
    """The models whose methods run now in this thread, the innermost first; one with several methods comes several times."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        model = frame.f_locals.get("self")
        if isinstance(model, PreTrainedModel):
            yield model
        frame = frame.f_back


def check_decoder(decoder: Decoder) -> None:
    """Raise OrderError if some attention modules of a decoder are bidirectional and others are not, or the model is not."""
    model = decoder.module
    if different := [each.path for each in decoder.attentions if is_open(each.module) != is_open(model)]:
        _refuse(model, different)


def _refuse(model: nn.Module, different: Iterable[str]) -> None:
    """Raise for attention modules that attend otherwise than their model."""
    how = "isn't bidirectional, and the model is" if is_open(model) else "is bidirectional, and the model isn't"
    raise OrderError(
        f"{original(type(model)).__name__}: {', '.join(different)} {how}, since a layer was put in or taken out, or belongs to "
        "another model too: call enable_bidirectional(model) or disable_bidirectional(model) again"
    )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where a wrapper stands in between."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found
