"""What a survey finds: a decoder, its attention modules, and what the patch has to know of each of their parts."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ArgumentError, UnsupportedModelError
from ..swap.classes import is_open, is_sharded, original
from ..swap.instance_forward import calls_the_patch
from ..swap.modes import Mode, Setting
from ..swap.record import before_patch, changed_attributes, own_before_patch, plans_of, setting_of
from .buffers import triangular_buffers
from .code import Code
from .config import Backend, backend_of, kernel_of, text_config
from .facts import causal_flags
from .places import Place, attentions_in, fits_inside, layers_in, out_of_place
from .refusals import Refusal
from .sinks import NO_SINKS, Sinks
from .walk import layers_of, modules_of, parameters_of
from .windows import Span


class Part:
    """One module of a decoder, as it is without the patch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def cls(self) -> type:
        """The class of the model's own code."""
        return original(type(self.module))

    @property
    def causal_flags(self) -> tuple[str, ...]:
        """The names of the flags by which it says that it is causal."""
        return causal_flags(self.module)

    @cached_property
    def causal_buffers(self) -> dict[str, Tensor]:
        """Its own buffers that are causal masks."""
        return triangular_buffers(self.module)

    @property
    def config(self) -> Any:
        """Its config; None if it keeps none."""
        return before_patch(self.module, "config")

    def own(self, name: str) -> Any:
        """Its own attribute of that name; None if it has none."""
        return own_before_patch(self.module, name)

    @property
    def has_weights(self) -> bool:
        """Whether there are parameters in it."""
        return next(parameters_of(self.module), None) is not None


class Attention(NamedTuple):
    """One attention module of a decoder."""

    path: str  # its name in the decoder
    module: nn.Module
    span: Span
    layer: str  # the name of the layer that it is in

    @property
    def parts(self) -> list[Part]:
        """Itself, and all modules inside it."""
        return [Part(module) for module in modules_of(self.module)]


@dataclass
class Decoder:
    """One decoder in a model: the module that makes the mask, and the attention modules that use it."""

    name: str  # its name in the model that was searched
    module: PreTrainedModel
    attentions: list[Attention] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)  # of its layers, and of other models, that stay causal
    builders: list[PreTrainedModel] = field(default_factory=list)  # models around it that make its mask, as some do
    cache_makers: list[PreTrainedModel] = field(default_factory=list)  # other models around it that make a KV cache for it
    sinks: Sinks = NO_SINKS  # as its spans have them, see `with_sinks`

    @property
    def config(self) -> Any:
        """The text part of its config."""
        return text_config(self.module.config)

    @property
    def backend(self) -> Backend:
        """The kind of its attention function."""
        return backend_of(self.config)

    @property
    def kernel(self) -> str:
        """The name of its attention function."""
        return kernel_of(self.config)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The different spans of its attention modules, in order of first appearance."""
        return tuple(dict.fromkeys(attention.span for attention in self.attentions))

    @property
    def classes(self) -> frozenset[type]:
        """The classes of its attention modules, and of the layers that these are in."""
        paths = [attention.path for attention in self.attentions]
        layers = [m for name, m in layers_of(self.module).items() if any(p.startswith(f"{name}.") for p in paths)]
        return frozenset((*map(_layer_class, layers), *(original(type(a.module)) for a in self.attentions)))

    @property
    def part_classes(self) -> frozenset[type]:
        """The classes of its attention modules and of all in them. A proof keeps their code, which is pickled with the model."""
        return frozenset(part.cls for attention in self.attentions for part in attention.parts)

    @property
    def mask_makers(self) -> tuple[PreTrainedModel, ...]:
        """Every model that makes a mask for it: itself, and those around it."""
        return self.module, *self.builders

    @property
    def outermost(self) -> PreTrainedModel:
        """The outermost model that makes its mask."""
        return self.builders[0] if self.builders else self.module

    @property
    def names_in_makers(self) -> tuple[str, ...]:
        """The name of the decoder in each of its `mask_makers`."""
        return tuple(next(n for n, module in maker.named_modules() if module is self.module) for maker in self.mask_makers)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the attention modules stand in its layers."""
        pairs = ((each.layer.rpartition(".")[0], each.path[len(each.layer) + 1 :]) for each in self.attentions)
        return tuple(dict.fromkeys(Place(layers, attention) for layers, attention in pairs if layers))

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that the patch may change for it."""
        parts = (part for attention in self.attentions for part in modules_of(attention.module))
        return [*self.mask_makers, *self.cache_makers, *parts]

    @property
    def is_on_meta(self) -> bool:
        """Whether its weights have no values yet."""
        return all(parameter.is_meta for parameter in parameters_of(self.module))

    @property
    def setting(self) -> Setting:
        """In which mode it is now, and with which sinks."""
        now, outer = setting_of(self.module), setting_of(self.outermost)
        if self.is_mixed:
            return Setting(Mode.MIXED, NO_SINKS if now is None else now.sinks)
        if now is None or outer is None or now.mode is Mode.CAUSAL_BLOCK:
            return now or Setting(Mode.AS_LOADED)
        return Setting(outer.mode, now.sinks)

    @property
    def is_patched(self) -> bool:
        """Whether every model that makes the mask and every attention module has the patch, and a call of each runs it.

        And each attention module has the sinks and the window of its place, and the models around it make the mask for these.
        Nobody has changed what the patch set on them.
        """
        parts = (attention.module for attention in self.attentions)
        has_all = all(is_open(part) and calls_the_patch(part) for part in (*self.mask_makers, *parts))
        has_all = has_all and not any(map(changed_attributes, self.modules))
        return has_all and not self.out_of_place and all(map(fits_inside, self.builders))

    @property
    def code(self) -> Code | None:
        """The code with which it was seen to become bidirectional; None if that was not seen, or if it is not patched."""
        settings = (plan.settings for plan in plans_of(self.module))
        return next((each.code for each in settings if isinstance(getattr(each, "code", None), Code)), None)

    @property
    def out_of_place(self) -> list[nn.Module]:
        """Its patched attention modules that have other sinks or another window than their places ask for."""
        return out_of_place(self.module, attentions_in(self.module, self.places))

    @property
    def has_any_patch(self) -> bool:
        """Whether any module of it has a part of the patch."""
        return any(map(plans_of, self.modules))

    @property
    def is_mixed(self) -> bool:
        """Whether the patch has made only some of its modules bidirectional, a call of one goes around it, or one was moved."""
        if self.is_in_block:
            return any(is_open(attention.module) for attention in self.attentions)
        return self.has_any_patch and not self.is_patched

    @property
    def is_in_block(self) -> bool:
        """Whether it is inside a causal block, opened by any thread."""
        now = setting_of(self.module)
        return now is not None and now.mode is Mode.CAUSAL_BLOCK

    def as_patched(self) -> "Decoder":
        """This decoder with the sinks that it has now; with as many sinkless layers as are left, if some were taken out."""
        return self.with_sinks_as_far_as_layers_go(Sinks(*self.setting.sinks))

    def with_sinks_as_far_as_layers_go(self, sinks: Sinks) -> "Decoder":
        """`with_sinks`, for sinks that it had before layers were taken out of it."""
        layers = len(self._layers_with_attention())
        return self.with_sinks(sinks._replace(num_sinkless_layers=min(sinks.num_sinkless_layers, layers)))

    def with_sinks(self, sinks: Sinks) -> "Decoder":
        """This decoder with these sinks in the spans of its attention modules.

        Raises:
            ArgumentError: more sinkless layers than it has.
            UnsupportedModelError: sinkless layers in a decoder that uses one layer several times, or lacks layers that may have
                had no attention.
        """
        tokens, sinkless = sinks
        layers = self._layers_with_attention()
        if sinkless > len(layers):
            raise ArgumentError(
                f"num_sinkless_layers={sinkless}, and {type(self.module).__name__} has {len(layers)} layers with attention"
            )
        if sinkless:
            self._check_layers_can_be_counted(layers)
        blind = layers[len(layers) - sinkless :]
        attentions = [
            attention._replace(span=attention.span._replace(sinks=tokens, sees_sinks=attention.layer not in blind))
            for attention in self.attentions
        ]
        return replace(self, attentions=attentions, sinks=sinks)

    def with_sinks_like(self, other: "Decoder", most: int) -> "Decoder":
        """This decoder with sinks that stand for another's: `most` tokens at most, and layers of both kinds if that has both."""
        tokens, sinkless = other.sinks
        layers, others_layers = ({attention.layer for attention in each.attentions} for each in (self, other))
        most_layers = len(layers) if sinkless == len(others_layers) else max(1, len(layers) - 1)
        return self.with_sinks(Sinks(min(tokens, most), min(sinkless, most_layers)))

    def _layers_with_attention(self) -> list[str]:
        """The names of its layers with attention, in order, and of those that are missing, as in a stage of a pipeline."""
        here = dict.fromkeys(attention.layer for attention in self.attentions)
        listed = dict(layers_in(self.module, self.places))
        if None not in listed.values():
            return list(here)
        return [name for name, layer in listed.items() if layer is None or name in here]

    def _check_layers_can_be_counted(self, counted: list[str]) -> None:
        listed = dict(layers_in(self.module, self.places))
        if None in listed.values() and not listed.keys() <= set(counted):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} lacks some layers, and some that are there have no attention, so that its last "
                "layers with attention can't be counted: give num_sinkless_layers=0"
            )
        lists = [list(each._modules.values()) for each in modules_of(self.module) if isinstance(each, nn.ModuleList)]
        for each in (*lists, [attention.module for attention in self.attentions]):
            there = [id(module) for module in each if module is not None]
            if len(set(there)) < len(there):
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} uses one layer several times, so that its last layers can't be told from the "
                    "others: give num_sinkless_layers=0"
                )


def _layer_class(layer: nn.Module) -> type:
    """The class of a layer inside torch's own wrappers (compiled, checkpointed, sharded)."""
    while type(layer).__module__.startswith("torch.") and len(layer._modules) == 1:
        (inner,) = layer.children()
        layer = inner
    return next(cls for cls in original(type(layer)).__mro__ if not is_sharded(cls))
