"""What a run writes: checkpoints to resume from, and the trained encoder."""

from typing import Any

from peft import PeftModel
from transformers import AutoModel

from ...errors import ConfigError
from ..loading import loading
from ..lora import load_adapter_weights


def save_checkpoint(model: Any, folder: str) -> None:
    """Write what was trained: the adapter of a SentenceTransformer, or its whole model if it has no adapter."""
    trained = model[0].model
    options = {"save_embedding_layers": False} if isinstance(trained, PeftModel) else {}
    trained.save_pretrained(folder, **options)


def load_checkpoint(model: Any, folder: str) -> None:
    """Load what `save_checkpoint` wrote, in place.

    Raises:
        ConfigError: The checkpoint cannot be read, or it is of another model or adapter.
    """
    trained = model[0].model
    if isinstance(trained, PeftModel):
        load_adapter_weights(trained, folder)
        return
    with loading(f"the model in {folder}"):
        weights = AutoModel.from_pretrained(folder, dtype=trained.dtype).state_dict()
        expected = trained.state_dict()
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
            raise ConfigError(f"the model in {folder} doesn't fit: it is another one than {trained.name_or_path}")
        trained.load_state_dict(weights)


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
    if getattr(module.model.config, "attention_dropout", None) is not None:
        module.model.config.attention_dropout = 0.0
    module.max_seq_length = max_seq_length
    if module.tokenizer.is_fast:
        module.tokenizer.backend_tokenizer.no_truncation()  # the last batch left its length there
    model.save_pretrained(folder)
