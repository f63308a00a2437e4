"""The `*ForCausalLM` in a model, the names of its parts, or a new one around a bare model."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..errors import HeadError
from ..model.config import text_config
from ..model.facts import names_in_forward, parameter_names
from ..swap.classes import original

_log = logging.getLogger(__name__)


def check_module(model: object) -> None:
    """Raise HeadError if `model` is no module."""
    if not isinstance(model, nn.Module):
        raise HeadError(f"expected a torch.nn.Module, got {type(model).__name__}: load the model and pass the object")


def find_causal(model: nn.Module) -> PreTrainedModel | None:
    """The first model in `model` that has an output head and computes a loss.

    Raises:
        HeadError: `model` is no module.
    """
    check_module(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            if "labels" in parameter_names(original(type(module))):
                return module
    return None


def check_causal(causal: PreTrainedModel) -> None:
    """Raise HeadError if `causal` can't be given scored positions alone, or scores labels without the shift by one."""
    head_slot(causal)
    names = names_in_forward(original(type(causal)))
    tensor_parallel = getattr(causal.config, "pretraining_tp", 1)
    if tensor_parallel > 1 and "pretraining_tp" in names:
        raise HeadError(
            f"with pretraining_tp={tensor_parallel} {type(causal).__name__} slices its output head instead of calling it: set "
            "model.config.pretraining_tp = 1, which computes the same"
        )
    # The decoders of encoder-decoders (Bart, Whisper) have a loss without the shift.
    if not any(name == "loss_function" or "shift" in name for name in names):
        raise HeadError(
            f"{type(causal).__name__} scores labels where they stand, without the shift by one that MNTP is trained "
            "with: use a decoder-only *ForCausalLM"
        )


def head_slot(causal: PreTrainedModel) -> str:
    """The name under which `causal` holds its output head.

    Raises:
        HeadError: it holds several, or holds it inside another module.
    """
    head = causal.get_output_embeddings()
    if isinstance(head, nn.ModuleList):
        raise HeadError(f"{type(causal).__name__} has {len(head)} output heads, and MNTP scores one: use a text model")
    for name, child in causal._modules.items():
        if child is head:
            return name
    raise HeadError(
        f"{type(causal).__name__} keeps its output head ({type(head).__name__}) inside another module, where it can't "
        "be given the scored positions alone: use the stock loss with enable_bidirectional(model)"
    )


def decoder_slot(causal: PreTrainedModel) -> str:
    """The name under which `causal` holds its decoder, or a module with the decoder and a vision tower; "" if there is none."""
    if causal.base_model_prefix in causal._modules:
        return causal.base_model_prefix
    embedding = causal.get_input_embeddings()
    for name, child in causal.named_children():
        if child is not embedding and any(module is embedding for module in child.modules()):
            return name
    return ""


def vocabulary_size(causal: PreTrainedModel) -> int | None:
    """The number of ids that the output head scores; None if it does not say."""
    size = getattr(causal._modules[head_slot(causal)], "out_features", None)
    return size if isinstance(size, int) else None


def build_around(model: nn.Module) -> PreTrainedModel:
    """The `*ForCausalLM` of a bare model's config, around `model` itself. Only a new head's weights are allocated.

    Raises:
        HeadError: `model` is not the backbone of a `*ForCausalLM`.
    """
    bare = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if bare is None or not (bare is model or hasattr(model, "peft_config")):
        raise HeadError(
            f"{type(model).__name__} holds no causal language model with a loss: pass a *ForCausalLM, a bare *Model of "
            "one, or PEFT over either, before it is wrapped in anything else"
        )
    if type(bare.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HeadError(f"transformers knows no *ForCausalLM for {type(bare).__name__}: use a decoder-only model")
    with torch.device("meta"):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(bare.config)](bare.config)
    slots = {type(child): name for name, child in causal.named_children()}
    slot = slots.get(original(type(bare)), "")
    if not slot:
        raise HeadError(
            f"{type(bare).__name__} is not the backbone of {type(causal).__name__}: load a *ForCausalLM and pass that"
        )
    check_causal(causal)  # before a new head draws its weights
    setattr(causal, slot, model)
    causal.training = model.training
    _add_weights(causal, slot, bare)
    return causal


def _add_weights(causal: Any, backbone: str, bare: Any) -> None:
    """Give all parts but the backbone weights of their own, or the embedding's where the config ties them."""
    embedding = bare.get_input_embeddings().weight
    for name, child in causal.named_children():
        if name != backbone:
            child.to_empty(device=embedding.device).to(embedding.dtype).train(causal.training)
            child.apply(causal._init_weights)
    if getattr(text_config(bare.config), "tie_word_embeddings", False):
        causal.get_output_embeddings().weight = embedding
    else:
        names = type(bare).__name__, type(causal).__name__
        _log.warning("%s has no output head: that of its %s is new. Load the *ForCausalLM to keep one.", *names)
