"""Where the attention modules of a decoder stand, and whether each patched one has the window and sinks of its place.

A layer may be put in, moved or taken out while a model is bidirectional. It brings the span that it has been given: the sinks of
its model then, and whether it is one of the sinkless layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..swap.record import Kept, setting_of, settings_of
from .walk import modules_of
from .windows import Span


class Place(NamedTuple):
    """Where each layer of a decoder has an attention module: `layers` and `self_attn`, for example."""

    layers: str
    attention: str  # "" where the layer itself is the attention module


@dataclass(frozen=True)
class Channels(Kept):
    """What a patched model knows of the mask that it makes: one channel for each of its decoder's spans."""

    spans: tuple[Span, ...]
    decoder: str  # the decoder's name in it, "" where it is the decoder itself


@dataclass(frozen=True)
class Channel(Kept):
    """What a patched attention module knows of the mask that it takes its channel of."""

    span: Span
    index: int  # which of the decoder's spans that is
    spans: int  # how many there are

    def is_among(self, spans: tuple[Span, ...]) -> bool:
        """Whether a mask with channels for `spans` has this one."""
        return self.spans == len(spans) and spans[self.index] == self.span


def layers_in(model: nn.Module, places: Sequence[Place]) -> Iterator[tuple[str, nn.Module | None]]:
    """The layers of a decoder with their names, in order; None where a layer is missing, as in a stage of a pipeline."""
    for where in dict.fromkeys(place.layers for place in places):
        layers = submodule(model, where)
        for name, layer in () if layers is None else layers._modules.items():
            if layer is not None or isinstance(layers, nn.ModuleList):
                yield f"{where}.{name}", layer


def attentions_in(model: nn.Module, places: Sequence[Place]) -> Iterator[list[nn.Module] | None]:
    """For each layer of a decoder, in order, the modules where its attention stands; None where a layer is missing.

    Of a layer that has nothing there, or only a wrapper of it, the patched ones wherever they are.
    """
    for name, layer in layers_in(model, places):
        paths = [place.attention for place in places if place.layers == name.rpartition(".")[0]]
        if layer is None:
            yield None
        else:
            there = [module for path in paths if (module := submodule(layer, path)) is not None]
            yield [part for module in there for part in _patched_in(module) or [module]] or _patched_in(layer)


def _patched_in(module: nn.Module) -> list[nn.Module]:
    """The module itself if it is patched attention, else what is so inside it: it may be a wrapper."""
    if settings_of(module, Channel) is not None:
        return [module]
    return [part for part in modules_of(module) if settings_of(part, Channel) is not None]


def out_of_place(model: nn.Module, layers: Iterable[Sequence[nn.Module] | None]) -> list[nn.Module]:
    """The patched attention modules whose spans aren't those that a bidirectional decoder asks for.

    Args:
        model: the decoder.
        layers: what `attentions_in` gives.
    """
    channels, setting = settings_of(model, Channels), setting_of(model)
    if channels is None or setting is None:
        return []
    tokens, sinkless = setting.sinks
    given = ((layer, [(m, own) for m in layer or () if (own := settings_of(m, Channel)) is not None]) for layer in layers)
    counted = [patched for layer, patched in given if patched or layer is None]  # a missing one counts
    return [
        module
        for left, layer in zip(range(len(counted), 0, -1), counted)
        for module, own in layer
        if own.span.sinks != tokens or own.span.sees_sinks != (left > sinkless) or not own.is_among(channels.spans)
    ]


def names_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """The names of some modules in `model`."""
    asked = set(modules)
    return [name for name, module in model.named_modules() if module in asked]


def fits_inside(maker: nn.Module) -> bool:
    """Whether the decoder in a model is patched for the mask that the patched model makes for it, with the same spans.

    Also where the model is the decoder itself, and where no decoder is found any more.
    """
    mine = settings_of(maker, Channels)
    inside = submodule(maker, mine.decoder) if mine is not None and mine.decoder else None
    return mine is None or inside is None or spans_in(inside) == mine.spans


def spans_in(model: nn.Module) -> tuple[Span, ...] | None:
    """The spans of the first patched model in `model`; None if there is none."""
    return next((own.spans for module in modules_of(model) if (own := settings_of(module, Channels))), None)


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where a wrapper stands in between."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found
