"""Writing a trained encoder so that it opens without the adapters of the steps before."""

from typing import Any

from ...checkpoints.merged import with_adapters_merged


def save_encoder(model: Any, folder: str, max_seq_length: int) -> None:
    """Write a SentenceTransformer with its adapter merged.

    The model itself keeps its adapter, because a copy is merged. Dropout and a limit of tokens that were only for
    training are not written.

    Args:
        model: The SentenceTransformer.
        folder: Where to write it.
        max_seq_length: How many tokens of a text the written model reads.
    """
    module = model[0]
    trained = module.model
    module.model = with_adapters_merged(trained)
    config = module.model.config
    dropout = getattr(config, "attention_dropout", None)
    if dropout is not None:
        config.attention_dropout = 0.0
    trained_length = module.max_seq_length
    module.max_seq_length = max_seq_length
    if module.tokenizer.is_fast:
        module.tokenizer.backend_tokenizer.no_truncation()  # the last batch left its length there
    try:
        model.save_pretrained(folder)
    finally:
        if dropout is not None:
            config.attention_dropout = dropout
        module.max_seq_length = trained_length
        module.model = trained
