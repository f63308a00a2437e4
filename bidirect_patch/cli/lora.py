"""The LoRA adapter that both trainers train. This module needs PEFT."""

from typing import Any

from peft import LoraConfig, get_peft_model

from .settings import CommonModelArguments


def with_lora(model: Any, settings: CommonModelArguments) -> Any:
    """Put a new LoRA adapter on every linear layer of a model.

    Args:
        model: A backbone, without a head.
        settings: The rank and the dropout of the adapter. With rank 0 there is no adapter.

    Returns:
        The model inside a PeftModel, or the model itself if there is no adapter.
    """
    if not settings.lora_r:
        return model
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
    )
    return get_peft_model(model, config)
