"""Writing a trained encoder so that it opens without the adapters of the steps before."""

import copy
from typing import Any


def save_merged(model: Any, folder: str) -> None:
    """Write a SentenceTransformer with its adapter merged.

    The model itself keeps its adapter, because a copy is merged. Dropout that was only for training is not written.

    Args:
        model: The SentenceTransformer.
        folder: Where to write it.
    """
    module = model[0]
    trained = module.model
    if hasattr(trained, "peft_config"):
        module.model = copy.deepcopy(trained).merge_and_unload()
    config = module.model.config
    dropout = getattr(config, "attention_dropout", None)
    if dropout is not None:
        config.attention_dropout = 0.0
    try:
        model.save_pretrained(folder)
    finally:
        if dropout is not None:
            config.attention_dropout = dropout
        module.model = trained
