"""Which models and layers are refused, and what is said of each kind. A new recurrent layer: a pattern in `facts` alone."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..swap.classes import original
from ..swap.record import before_patch
from .buffers import triangular_buffers
from .config import says_bidirectional
from .facts import (
    POSITIONWISE,
    builds_causal_mask,
    causal_flags,
    extends_mask,
    is_attention,
    is_built_causal,
    is_named_attention,
    is_recurrent,
)
from .walk import is_inside, modules_of, name_and_class

Kind = Literal["encoder", "no mask", "encoder-decoder", "no attention", "shared keys", "other mixer"]


class Refusal(NamedTuple):
    """Why a model inside the given one is no decoder that can be patched, or why a layer of a decoder stays causal.

    Attributes:
        kind: What it is, for code.
        where: Its name and class, as a message begins.
        message: Why, in words.
    """

    kind: Kind
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where} {self.message}"

    @property
    def blocks_others(self) -> bool:
        """Whether its layers stay causal beside a decoder. An encoder (a vision tower) is bidirectional as it is."""
        return self.kind not in ("encoder", "no mask")


def why_not(
    name: str, model: PreTrainedModel, attentions: list[tuple[str, nn.Module]], models: list[tuple[str, Any]]
) -> Refusal | None:
    """Why a model can't be patched; None if it can, or if it only wraps other models.

    Args:
        name: its name in the model that is looked at.
        model: it.
        attentions: its own attention modules by name.
        models: every PreTrainedModel in the model that is looked at, by name.
    """
    where = f"{name_and_class(name, model)}:"
    if not attentions:
        wraps = any(is_inside(other, name) for other, _ in models)
        return None if wraps else _why_no_attention(where, model)
    around = [outer for at, outer in models if at == name or is_inside(name, at)]
    if any(getattr(outer.config, "is_encoder_decoder", False) for outer in around):
        return Refusal("encoder-decoder", where, "an encoder-decoder")
    modules = [module for _, module in attentions]
    if all(getattr(module, "is_kv_shared_layer", False) for module in modules):  # Gemma 4's assistants draft for another model
        return Refusal("shared keys", where, f"all keys and values of its {_kinds(modules)} come from another model")
    decodes = getattr(model.config, "is_decoder", False)
    causal = decodes or _were_built_causal(modules) or says_bidirectional(model.config)
    cls = original(type(model))
    if causal and (builds_causal_mask(cls) or (decodes and extends_mask(cls))):
        return None
    parts = (model, *(part for module in modules for part in modules_of(module)))
    if causal_flags(model) or any(map(triangular_buffers, parts)):
        return None
    return Refusal("no mask", where, f"an encoder: nothing makes a causal mask for its {_kinds(modules)}")


def why_not_layer(name: str, layer: nn.Module) -> Refusal | None:
    """Why a decoder's layer of that name stays causal; None if nothing in it mixes tokens but attention."""
    others = _unsupported_parts(layer)
    return Refusal("other mixer", f"{name} {type(layer).__name__}", f"with {', '.join(others)}") if others else None


def _why_no_attention(where: str, model: PreTrainedModel) -> Refusal | None:
    lists = [m for m in modules_of(model) if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return None
    layers = max(lists, key=len)
    others = dict.fromkeys(name for layer in layers for name in _other_mixers(layer))
    if others:
        return Refusal("no attention", where, f"its layers ({_kinds(layers)} with {', '.join(others)}) have no attention")
    named = [m for layer in layers for m in modules_of(layer) if is_named_attention(original(type(m)))]
    if named:
        return Refusal("no mask", where, f"its {_kinds(named)} take no mask: an encoder, or attention that is causal by itself")
    return Refusal("encoder", where, f"an encoder: its layers ({_kinds(layers)}) have no causal attention")


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
