"""Writing a trained model so that it opens again as a bidirectional one."""

from typing import Any

from transformers import PreTrainedModel

from .model import adapter_of


def save_bidirectional(
    model: PreTrainedModel, folder: str, tokenizer: Any = None, state_dict: dict[str, Any] | None = None
) -> None:
    """Write a model, or only its adapter if it has one.

    A model is written with a config.json that says `"is_causal": false`. The names of architectures stay those of
    transformers. As in LLM2Vec, an adapter is written for the bare backbone. Its adapter_config.json carries the mark
    that it was trained bidirectionally.

    Args:
        model: The trained model.
        folder: Where to write it.
        tokenizer: Is written too, if it is given.
        state_dict: The weights to write, where the model's own are sharded.
    """
    adapter = adapter_of(model)
    if adapter is None:
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        prefix = f"{model.base_model_prefix}."
        if state_dict is not None:
            state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        adapter.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
