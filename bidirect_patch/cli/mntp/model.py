"""The tokenizer and the model that are trained for masked next token prediction."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ...checkpoints.guard import opening_sinks
from ...checkpoints.marks import saved_sinks
from ...errors import ConfigError, UnsupportedModelError
from ...mntp.head import apply_mntp_head
from ...model.sinks import Sinks
from ...model.tiny import tiny_like
from ...patch import enable_bidirectional
from ..layers import check_layers, keep_layers, number_of_layers
from ..loading import loading
from ..lora import with_lora
from ..sinks import check_sinkless, choose_sinks
from ..versions import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark
from .settings import ModelArguments

POSITIONS = "max_position_embeddings"  # in every config; some have it under another name too


def load_tokenizer(settings: ModelArguments) -> Any:
    """Load the tokenizer of the settings.

    Raises:
        ConfigError: There is no such tokenizer.
    """
    name = settings.tokenizer_name or settings.model_name_or_path
    return _load(AutoTokenizer, name, settings, use_fast=settings.use_fast_tokenizer)


class ModelFacts(NamedTuple):
    """What is known of a model before it is loaded.

    Attributes:
        limit: The largest number of tokens that it can read, or None if it has no such limit.
        sinks: The sink tokens and sinkless layers that it gets: those of the settings, else those that it was saved with.
    """

    limit: int | None
    sinks: Sinks


def check_model(settings: ModelArguments) -> ModelFacts:
    """Raise the errors of `load_model` that concern the model's class and backend.

    This reads the config alone and builds a small random model from it, which is faster than loading the weights.
    """
    config = _load(AutoConfig, settings.model_name_or_path, settings)
    sinks = choose_sinks(settings, saved_sinks(config))
    if settings.layers is not None:
        check_layers(config, settings.layers)
    check_sinkless(sinks.num_sinkless_layers, settings.layers or number_of_layers(config))
    try:
        with loading(str(settings.model_name_or_path)):
            small = tiny_like(config, settings.attn_implementation, settings.trust_remote_code)
    except UnsupportedModelError:  # the model itself may load all the same, or its error says more
        return ModelFacts(None, sinks)
    fewer = min(sinks.num_sinkless_layers, number_of_layers(small.config) or 0)
    apply_mntp_head(enable_bidirectional(small, num_sink_tokens=sinks.num_sink_tokens, num_sinkless_layers=fewer))
    return ModelFacts(getattr(config, POSITIONS, None) if _has_position_table(small) else None, sinks)


def load_model(settings: ModelArguments) -> PreTrainedModel:
    """Load the causal model of the settings, make it bidirectional and give it an MNTP head. Its weights stay as they were.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    dtype = getattr(torch, settings.torch_dtype, settings.torch_dtype)  # "auto" stays a string
    model = _load(
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


def _has_position_table(small: PreTrainedModel) -> bool:
    """Say whether a small model fails on a text that is longer than its config allows, as with learned positions."""
    limit = getattr(small.config, POSITIONS, None)
    return isinstance(limit, int) and _reads(small, limit) and not _reads(small, limit + 1)


def _reads(small: PreTrainedModel, length: int) -> bool:
    try:
        with torch.no_grad():
            small(input_ids=torch.ones(1, length, dtype=torch.long))
    except Exception:  # which one depends on the model, and on the backend
        return False
    return True


def _load(auto_class: Any, name: str | None, settings: ModelArguments, **options: Any) -> Any:
    options |= {"cache_dir": settings.cache_dir, "revision": settings.model_revision, "token": settings.token}
    options |= {"trust_remote_code": settings.trust_remote_code}
    if settings.gguf_file:
        options["gguf_file"] = settings.gguf_file
    if name and os.path.isabs(name) and not os.path.isdir(name):
        raise ConfigError(f"can't load {name!r}: there is no such folder")
    with loading(repr(name)), opening_sinks():
        return auto_class.from_pretrained(name, **options)
