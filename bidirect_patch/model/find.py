"""Find the decoders in a model and what has to change in them. Why others can't be changed stands in `refusals`.

One rule serves every architecture. A decoder is a `PreTrainedModel` that makes a causal mask for the attention modules in
its list of layers. A layer without an attention module, or with something else that mixes tokens, is unsupported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..swap.classes import original
from .decoder import Attention, Decoder
from .facts import forward_builds_mask, is_attention, makes_cache, mask_parameter, reads_layer_kinds
from .refusals import Refusal, why_not, why_not_layer
from .walk import is_inside
from .windows import span_of


@dataclass(frozen=True)
class Survey:
    """What one walk through a model has found."""

    model: nn.Module
    named: list[tuple[str, nn.Module]]  # every module in it, once, with its name
    decoders: list[Decoder]

    @property
    def modules(self) -> list[nn.Module]:
        """Every module in the model, once."""
        return [module for _, module in self.named]


def decoders(model: Any) -> list[Decoder]:
    """Every decoder in `model`; see `survey`."""
    return survey(model).decoders


def holds_decoder(model: nn.Module) -> bool:
    """Whether there is a decoder in `model`; else it is an encoder, of which `is_causal: false` is true as it is."""
    try:
        return bool(decoders(model))
    except UnsupportedModelError:
        return False


def check_module(model: Any) -> None:
    """Raise UnsupportedModelError for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module that holds a transformers decoder, got {type(model).__name__}: load the model first "
            "(AutoModelForCausalLM.from_pretrained, for example) and pass the object"
        )


def survey(model: Any) -> Survey:
    """Look at a model once.

    Raises:
        UnsupportedModelError: there is no decoder in it; the message names what there is.
    """
    check_module(model)
    named = list(model.named_modules())
    models = [(name, module) for name, module in named if isinstance(module, PreTrainedModel)]
    found: list[Decoder] = []
    refusals: list[Refusal] = []
    for name, module in models:
        attentions = list(_own_attentions(module))
        refusal = why_not(name, module, attentions, models)
        if refusal is not None:
            refusals.append(refusal)
        elif attentions:
            found.append(_describe(name, module, attentions))
    if not found:
        what = "; ".join(map(str, refusals))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder with causal attention that could be made bidirectional "
            f"({what or 'no transformers PreTrainedModel inside'})"
        )
    found[0].refusals += [refusal for refusal in refusals if refusal.blocks_others]
    for decoder in found:
        around = [module for name, module in models if is_inside(decoder.name, name)]
        for module in around:
            cls = original(type(module))
            if forward_builds_mask(cls) and mask_parameter(cls) is not None:
                decoder.builders.append(module)
            elif makes_cache(cls):
                decoder.cache_makers.append(module)
    return Survey(model, named, found)


def _own_attentions(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Outermost attention modules of `model` that belong to no PreTrainedModel inside it."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, PreTrainedModel):
                continue
            if is_attention(child):
                yield path, child
            else:
                yield from walk(path, child)

    yield from walk("", model)


def _describe(name: str, model: PreTrainedModel, attentions: list[tuple[str, nn.Module]]) -> Decoder:
    decoder = Decoder(name, model)
    reads_kinds = reads_layer_kinds(original(type(model)))
    lists: dict[str, nn.ModuleList] = {}
    for path, module in attentions:
        steps = path.split(".")
        holders = ["", *(".".join(steps[:i]) for i in range(1, len(steps)))]
        modules = accumulate(steps[:-1], getattr, initial=model)
        holder = next(((h, m) for h, m in zip(holders, modules) if isinstance(m, nn.ModuleList)), None)
        layer = path
        if holder is not None:
            lists.update([holder])
            layer = f"{holder[0]}.{path[len(holder[0]) :].strip('.').split('.')[0]}"
        decoder.attentions.append(Attention(path, module, span_of(module, path, model.config, reads_kinds), layer))
    layers = ((f"{where}.{index}", layer) for where, entries in lists.items() for index, layer in enumerate(entries))
    refusals = (why_not_layer(name, layer) for name, layer in layers if layer is not None)
    decoder.refusals += [refusal for refusal in refusals if refusal is not None]
    return decoder
