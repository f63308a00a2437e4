"""The LoRA adapter that the training commands train. This module needs PEFT."""

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights

from ..checkpoints.loading import without_peft_warning
from ..errors import ConfigError
from ..model.find import decoders
from .common_settings import CommonModelArguments

WHOLE_MODULES = "modules_to_save"  # PEFT's name for what it trains and saves as a whole


def with_lora(model: Any, settings: CommonModelArguments, new_rows: Sequence[int] = ()) -> Any:
    """Put a new LoRA adapter on every linear layer of a model.

    Args:
        model: A backbone, without a head.
        settings: The rank and the dropout of the adapter. With rank 0 there is no adapter.
        new_rows: The ids whose rows of the input embedding are trained and saved too, because they were never trained.

    Returns:
        The model inside a PeftModel, or the model itself if there is no adapter.
    """
    if not settings.lora_r:
        return model
    rows = _rows_to_train(model, new_rows) if new_rows else {}
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        **rows,
    )
    with without_peft_warning():
        wrapped = get_peft_model(model, config)
    if WHOLE_MODULES in rows:
        _keep_other_rows(wrapped, new_rows)
    return wrapped


def check_depth(model: Any, adapter: str) -> None:
    """Check that an adapter was trained on as many layers as a model has.

    PEFT puts an adapter of the first layers on a whole model and leaves the others as they are.

    Args:
        model: A backbone without adapters.
        adapter: The adapter's folder or hub name.

    Raises:
        ConfigError: It was trained on the first layers alone.
    """
    config: Any = PeftConfig.from_pretrained(adapter)
    if getattr(config, "layers_to_transform", None) is not None:  # it is of some layers by its own word
        return
    names = load_peft_weights(adapter, device="cpu")
    for prefix in {layer.rpartition(".")[0] for layer in (a.layer for a in decoders(model)[0].attentions)}:
        found = [int(n) for name in names for n in re.findall(rf"(?:^|\.){re.escape(prefix)}\.(\d+)\.", name)]
        there = len(model.get_submodule(decoders(model)[0].name or "").get_submodule(prefix))
        if found and max(found) + 1 < there:
            raise ConfigError(
                f"the adapter {adapter} was trained on the first {max(found) + 1} layers, and the model has {there}: give "
                f"layers={max(found) + 1}"
            )


def trains_rows(adapter: PeftModel) -> bool:
    """Whether an adapter holds rows of the embedding too, so that its base must have as many rows before it is opened."""
    config: Any = adapter.peft_config[adapter.active_adapter]
    return bool(getattr(config, "trainable_token_indices", None) or config.modules_to_save)


def _rows_to_train(model: Any, new_rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of LoraConfig for rows of the input embedding."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if "trainable_token_indices" in {field.name for field in fields(LoraConfig)}:  # from PEFT 0.15 on
        return {"trainable_token_indices": {name: list(new_rows)}}
    return {WHOLE_MODULES: [name]}


def _keep_other_rows(model: Any, new_rows: Sequence[int]) -> None:
    """Let an embedding that is trained as a whole get a gradient in its new rows alone."""
    weight = next(p for name, p in model.named_parameters() if WHOLE_MODULES in name and p.requires_grad)
    is_new = torch.zeros(len(weight), 1, dtype=torch.bool)
    is_new[list(new_rows)] = True
    weight.register_hook(lambda gradient: gradient * is_new.to(gradient))
