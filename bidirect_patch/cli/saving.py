"""Writing the trained model so that it opens again as a bidirectional one, and finding checkpoints that are whole."""

import json
import os
import shutil
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .model import adapter_of


def save_bidirectional(
    model: PreTrainedModel, folder: str, tokenizer: Any = None, state_dict: dict[str, Any] | None = None
) -> None:
    """Write `model` to `folder`: its weights and a config.json that says `"is_causal": false`, or only its adapter.

    Architecture names stay the stock ones. An adapter is written for the bare backbone, as LLM2Vec's are; its
    adapter_config.json carries the mark that it was trained bidirectionally.

    Args:
        state_dict: the weights to write, where the model's own are sharded.
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


def put_aside_checkpoints(folder: str) -> None:
    """Rename the checkpoints of an earlier run that is overwritten, `checkpoint-9` to `old-checkpoint-9`, so that the new
    run isn't resumed from them. Those that were put aside before are removed."""
    for name in os.listdir(folder):
        path, aside = os.path.join(folder, name), os.path.join(folder, f"old-{name}")
        if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and os.path.isdir(path):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def last_whole_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; the trainer's state is written last."""
    if not os.path.isdir(folder):
        return None
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = [name[len(prefix) :] for name in os.listdir(folder) if name.startswith(prefix)]
    for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
        path = os.path.join(folder, f"{prefix}{step}")
        try:
            with open(os.path.join(path, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            continue
        return path
    return None
