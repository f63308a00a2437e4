"""What is known of a model before its weights are loaded, and loading a part of it: its config, tokenizer or weights."""

import os
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from ..checkpoints.guard import opening_sinks
from ..checkpoints.marks import saved_sinks
from ..errors import ConfigError, UnsupportedModelError
from ..model.sinks import Sinks
from ..model.tiny import tiny_like
from ..patch import enable_bidirectional
from .layers import check_layers, number_of_layers
from .load_errors import loading
from .sink_settings import check_sinkless, choose_sinks

POSITIONS = "max_position_embeddings"  # in every config; some have it under another name too


class ModelFacts(NamedTuple):
    """What is known of a model before it is loaded.

    Attributes:
        limit: The largest number of tokens that it can read, or None if it has no such limit.
        sinks: The sink tokens and sinkless layers that it gets: those of the settings, else those that it was saved with.
    """

    limit: int | None
    sinks: Sinks


def look_at(settings: Any, *saved: Sinks) -> tuple[ModelFacts, PreTrainedModel | None]:
    """Raise the errors of making a model bidirectional that concern its class and backend.

    This reads the config alone and builds a small random model from it, which is faster than loading the weights.

    Args:
        settings: The model, and what is made of it.
        *saved: The sinks that its adapters were saved with.

    Returns:
        The facts, and the small model, made bidirectional; None instead of it where none can be built.
    """
    config = load_part(AutoConfig, settings.model_name_or_path, settings)
    sinks = choose_sinks(settings, saved_sinks(config), *saved)
    if settings.layers is not None:
        check_layers(config, settings.layers)
    check_sinkless(sinks.num_sinkless_layers, settings.layers or number_of_layers(config))
    try:
        with loading(str(settings.model_name_or_path)):
            small = tiny_like(config, settings.attn_implementation, settings.trust_remote_code)
    except UnsupportedModelError:  # the model itself may load all the same, or its error says more
        return ModelFacts(None, sinks), None
    fewer = min(sinks.num_sinkless_layers, number_of_layers(small.config) or 0)
    enable_bidirectional(small, num_sink_tokens=sinks.num_sink_tokens, num_sinkless_layers=fewer)
    return ModelFacts(getattr(config, POSITIONS, None) if _has_position_table(small) else None, sinks), small


def load_part(auto_class: Any, name: str | None, settings: Any, **options: Any) -> Any:
    """Load something of a model by one of transformers' classes `Auto...`, from where the settings say.

    Raises:
        BackendError: A package that is needed is not installed.
        ConfigError: There is no such model.
    """
    options |= {"cache_dir": settings.cache_dir, "revision": settings.model_revision, "token": settings.token}
    options |= {"trust_remote_code": settings.trust_remote_code}
    if settings.gguf_file:
        options["gguf_file"] = settings.gguf_file
    if name and os.path.isabs(name) and not os.path.isdir(name):
        raise ConfigError(f"can't load {name!r}: there is no such folder")
    with loading(repr(name)), opening_sinks():
        return auto_class.from_pretrained(name, **options)


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
