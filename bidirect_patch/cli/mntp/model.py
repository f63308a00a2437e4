"""The tokenizer and the model that are trained for masked next token prediction."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ...checkpoints.marks import saved_sinks
from ...mntp.head import apply_mntp_head
from ...patch import enable_bidirectional
from ..layers import keep_layers
from ..lora import with_lora
from ..model_facts import ModelFacts, load_part, look_at
from ..settings_by_release import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark
from ..sink_settings import choose_sinks
from .settings import ModelArguments


def load_tokenizer(settings: ModelArguments) -> Any:
    """Load the tokenizer of the settings.

    Raises:
        ConfigError: There is no such tokenizer.
    """
    name = settings.tokenizer_name or settings.model_name_or_path
    return load_part(AutoTokenizer, name, settings, use_fast=settings.use_fast_tokenizer)


def check_model(settings: ModelArguments) -> ModelFacts:
    """Raise the errors of `load_model` that concern the model's class and backend, from its config alone."""
    facts, small = look_at(settings)
    if small is not None:
        apply_mntp_head(small)
    return facts


def load_model(settings: ModelArguments) -> PreTrainedModel:
    """Load the causal model of the settings, make it bidirectional and give it an MNTP head. Its weights stay as they were.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    dtype = getattr(torch, settings.torch_dtype, settings.torch_dtype)  # "auto" stays a string
    model = load_part(
        AutoModelForCausalLM,
        settings.model_name_or_path,
        settings,
        **{DTYPE_ARGUMENT: dtype},
        attn_implementation=settings.attn_implementation,
        low_cpu_mem_usage=settings.low_cpu_mem_usage,
        **plain_gguf_weights(settings.gguf_file),
    )
    if settings.gguf_file:
        remove_gguf_mark(model)
    if settings.layers is not None:
        keep_layers(model, settings.layers)
    enable_bidirectional(model, **choose_sinks(settings, saved_sinks(model))._asdict())
    return apply_mntp_head(model, eval_logits="scores")


def add_adapter(model: PreTrainedModel, settings: ModelArguments, new_rows: Sequence[int] = ()) -> None:
    """Put a LoRA adapter on the backbone of a model, in place. With `lora_r` 0 there is no adapter and all weights train.

    As in LLM2Vec, the adapter is on the backbone and not on the model with its head, because an encoder has no head. The
    head is frozen too, so what is saved is all that was trained.

    Args:
        model: The model.
        settings: The rank and the dropout of the adapter.
        new_rows: The ids whose embeddings are trained too, because they were never trained.
    """
    if settings.lora_r:
        model.requires_grad_(False)
        setattr(model, model.base_model_prefix, with_lora(model.base_model, settings, new_rows))


def adapter_of(model: PreTrainedModel) -> PeftModel | None:
    """Return the backbone with its adapter, or None if there is no adapter."""
    return model.base_model if isinstance(model.base_model, PeftModel) else None
