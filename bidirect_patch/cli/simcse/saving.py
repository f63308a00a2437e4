"""What a run writes: checkpoints to resume from, and the trained encoder."""

import os
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from ...checkpoints.guard import opening_sinks
from ...verify.mode import sinks_in
from ..checkpoints import check_same_sinks, check_same_weights, resuming
from ..settings_by_release import DTYPE_ARGUMENT
from .settings import DROPOUTS

PROJECTION = "projection.safetensors"  # in a checkpoint: what is trained after the pooling, with a teacher


def save_checkpoint(model: Any, folder: str, training: Any) -> None:
    """Write what was trained: the adapter of a SentenceTransformer, or its whole model if it has no adapter.

    Args:
        model: The SentenceTransformer.
        folder: Where to write it.
        training: The training arguments, which are written too.
    """
    trained = model[0].model
    options = {"save_embedding_layers": False} if isinstance(trained, PeftModel) else {}
    trained.save_pretrained(folder, **options)
    if _after_pooling(model):
        save_file(_after_pooling(model), os.path.join(folder, PROJECTION))
    torch.save(training, os.path.join(folder, "training_args.bin"))


def _after_pooling(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("0.")}


def load_checkpoint(model: Any, folder: str) -> None:
    """Load what `save_checkpoint` wrote, in place.

    Raises:
        ConfigError: The checkpoint cannot be read, or it is of another model or adapter.
    """
    trained = model[0].model
    with resuming(folder), opening_sinks():
        check_same_sinks(folder, sinks_in(trained))
        if isinstance(trained, PeftModel):
            weights = load_peft_weights(folder, device="cpu")
            check_same_weights(get_peft_model_state_dict(trained, save_embedding_layers=False), weights)
            set_peft_model_state_dict(trained, weights)
        else:
            weights = AutoModel.from_pretrained(folder, **{DTYPE_ARGUMENT: trained.dtype}).state_dict()
            check_same_weights(trained.state_dict(), weights)
            trained.load_state_dict(weights)
        path = os.path.join(folder, PROJECTION)
        projection = load_file(path) if os.path.isfile(path) else {}
        check_same_weights(_after_pooling(model), projection)
        model.load_state_dict(projection, strict=False)


def save_encoder(model: Any, folder: str, max_seq_length: int) -> None:
    """Write a SentenceTransformer with its adapter merged, so that it opens without those of the steps before.

    The model has no adapter afterwards. Dropout and a limit of tokens that were only for training are not written.

    Args:
        model: The SentenceTransformer.
        folder: Where to write it.
        max_seq_length: How many tokens of a text the written model reads.
    """
    module = model[0]
    if isinstance(module.model, PeftModel):
        module.model = module.model.merge_and_unload()
    for name in DROPOUTS:
        if getattr(module.model.config, name, None) is not None:
            setattr(module.model.config, name, 0.0)
    module.max_seq_length = max_seq_length
    if module.tokenizer.is_fast:
        module.tokenizer.backend_tokenizer.no_truncation()  # the last batch left its length there
    model.save_pretrained(folder)
