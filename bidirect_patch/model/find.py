"""Find the decoders in a model and what has to change in them, or say why they can't be made bidirectional.

One rule serves every architecture. A decoder is a `PreTrainedModel` that makes a causal mask for the attention modules in
its list of layers. A layer without an attention module, or with something else that mixes tokens, is unsupported.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..swap.classes import original
from ..swap.record import before_patch
from .buffers import triangular_buffers
from .config import text_config
from .decoder import Attention, Decoder, causal_flags
from .facts import (
    POSITIONWISE,
    builds_causal_mask,
    extends_mask,
    forward_builds_mask,
    is_built_causal,
    is_named_attention,
    is_recurrent,
    makes_cache,
    mask_parameter,
    reads_layer_kinds,
)
from .walk import modules_of
from .windows import span_of


class Refusal(NamedTuple):
    """Why a model inside the given one is no decoder that can be patched."""

    kind: Literal["encoder", "no mask", "encoder-decoder", "no attention", "shared keys"]
    message: str

    @property
    def blocks_others(self) -> bool:
        """Whether its layers stay causal beside a decoder. An encoder (a vision tower) is bidirectional as it is."""
        return self.kind in ("encoder-decoder", "no attention", "shared keys")


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
    refusals: list[tuple[str, Refusal]] = []
    for name, module in models:
        attentions = list(_own_attentions(module))
        refusal = _why_not(name, module, attentions, models)
        if refusal is not None:
            refusals.append((f"{f'{name} (' if name else ''}{type(module).__name__}{')' if name else ''}", refusal))
        elif attentions:
            found.append(_describe(name, module, attentions))
    if not found:
        what = "; ".join(f"{where}: {refusal.message}" for where, refusal in refusals)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder with causal attention that could be made bidirectional "
            f"({what or 'no transformers PreTrainedModel inside'})"
        )
    found[0].unsupported_layers += [f"{where}: {refusal.message}" for where, refusal in refusals if refusal.blocks_others]
    for decoder in found:
        around = [module for name, module in models if _is_inside(decoder.name, name)]
        for module in around:
            cls = original(type(module))
            if forward_builds_mask(cls) and mask_parameter(cls) is not None:
                decoder.builders.append(module)
            elif makes_cache(cls):
                decoder.cache_makers.append(module)
    return Survey(model, named, found)


def is_attention(module: nn.Module) -> bool:
    """Whether a module mixes tokens under a mask that it is given."""
    cls = original(type(module))
    return mask_parameter(cls) is not None and ("is_causal" in module.__dict__ or is_named_attention(cls))


def says_bidirectional(config: Any) -> bool:
    """Whether a config asks transformers itself for bidirectional attention.

    By `is_causal: false` (5.2 and newer), or by `use_bidirectional_attention` (Gemma: true, or "all" since Gemma 4).
    """
    # Both: in a causal block, the model has a view of its config, which says True.
    causal = {id(part): getattr(part, "is_causal", True) for part in (text_config(config), config)}
    own = getattr(text_config(config), "use_bidirectional_attention", None)
    return own is True or own == "all" or all(flag is False for flag in causal.values())


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


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


def _why_not(
    name: str, model: PreTrainedModel, attentions: list[tuple[str, nn.Module]], models: list[tuple[str, Any]]
) -> Refusal | None:
    """Why `model` can't be patched; None if it can, or if it only wraps other models."""
    if not attentions:
        wraps = any(_is_inside(other, name) for other, _ in models)
        return None if wraps else _why_no_attention(model)
    around = [outer for at, outer in models if at == name or _is_inside(name, at)]
    if any(getattr(outer.config, "is_encoder_decoder", False) for outer in around):
        return Refusal("encoder-decoder", "an encoder-decoder")
    modules = [module for _, module in attentions]
    if all(getattr(module, "is_kv_shared_layer", False) for module in modules):  # Gemma 4's assistants draft for another model
        return Refusal("shared keys", f"all keys and values of its {_kinds(modules)} come from another model")
    decodes = getattr(model.config, "is_decoder", False)
    causal = decodes or _were_built_causal(modules) or says_bidirectional(model.config)
    cls = original(type(model))
    if causal and (builds_causal_mask(cls) or (decodes and extends_mask(cls))):
        return None
    parts = (model, *(part for module in modules for part in modules_of(module)))
    if causal_flags(model) or any(map(triangular_buffers, parts)):
        return None
    return Refusal("no mask", f"an encoder: nothing makes a causal mask for its {_kinds(modules)}")


def _why_no_attention(model: PreTrainedModel) -> Refusal | None:
    lists = [m for m in modules_of(model) if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return None
    layers = max(lists, key=len)
    others = dict.fromkeys(name for layer in layers for name in _other_mixers(layer))
    if others:
        return Refusal("no attention", f"its layers ({_kinds(layers)} with {', '.join(others)}) have no attention")
    named = [m for layer in layers for m in modules_of(layer) if is_named_attention(original(type(m)))]
    if named:
        return Refusal("no mask", f"its {_kinds(named)} take no mask: an encoder, or attention that is causal by itself")
    return Refusal("encoder", f"an encoder: its layers ({_kinds(layers)}) have no causal attention")


def _were_built_causal(attentions: Iterable[nn.Module]) -> bool:
    """Whether attention modules or their parts say that they are causal: one does, or none says anything.

    On most releases they say so. Where they don't, the model's own mask code tells.
    """
    denied = False
    for module in (part for attention in attentions for part in modules_of(attention)):
        flag = before_patch(module, "is_causal")
        if flag is False and is_built_causal(original(type(module))):
            return True  # somebody set it to False since, which changes no mask that the model makes
        flag = getattr(module, "is_decoder", None) if flag is None else flag  # BERT, T5 and their kind on old releases
        if flag is True:
            return True
        denied = denied or flag is False
    return not denied


def _kinds(modules: Iterable[nn.Module]) -> str:
    return ", ".join(dict.fromkeys(type(module).__name__ for module in modules))


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
    for where, entries in lists.items():
        for index, entry in enumerate(entries):
            others = [] if entry is None else _unsupported_parts(entry)
            if others:
                decoder.unsupported_layers.append(f"{where}.{index} {type(entry).__name__} with {', '.join(others)}")
    return decoder


def _unsupported_parts(layer: nn.Module) -> list[str]:
    """Classes of what mixes tokens in a layer by other means than attention, or may do so in a layer without attention."""
    others = _other_mixers(layer)
    if others or any(map(is_attention, modules_of(layer))):
        return others
    return [type(m).__name__ for m in layer.children() if not POSITIONWISE.search(type(m).__name__)]


def _other_mixers(layer: nn.Module) -> list[str]:
    """Classes of what mixes tokens in `layer` by other means than attention; of a convolution, what holds it."""
    names = [type(module).__name__ for module in modules_of(layer) if _mixes_otherwise(module)]
    inside = [name for name in dict.fromkeys(names) if name != type(layer).__name__]
    return inside or names[:1]


def _mixes_otherwise(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module._modules.values()):
        return True
    return is_recurrent(type(module)) and not is_attention(module)
