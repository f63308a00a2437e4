"""The LoRA adapter that both trainers train. This module needs PEFT."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from ..errors import ConfigError
from .loading import loading
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


def load_adapter_weights(model: PeftModel, folder: str) -> None:
    """Load the weights of an adapter from a checkpoint, in place.

    Raises:
        ConfigError: The checkpoint cannot be read, or it is of another adapter or another model.
    """
    with loading(f"the adapter in {folder}"):
        weights = load_peft_weights(folder, device="cpu")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise ConfigError(f"the adapter in {folder} doesn't fit: it is of another lora_r, or of another model")
    set_peft_model_state_dict(model, weights)
