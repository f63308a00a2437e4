"""A run of contrastive training, from its settings to the saved encoder."""

from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from ...errors import ConfigError
from ..settings import transformers_errors
from .data import first_example, load_examples
from .model import check_views_differ, load_encoder
from .settings import DROPOUT, Settings
from .trainer import SimCSETrainer


def train(settings: Settings) -> None:
    """Train as the settings say, and write the result to their output_dir."""
    trainer = _make_trainer(settings)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "simcse merges the adapter into the model that it saves, and can't do that with sharded weights: run it under "
            "DDP instead"
        )
    result = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)


def _make_trainer(settings: Settings) -> SimCSETrainer:
    encoder, texts, training = settings
    set_seed(training.seed)
    data, single = load_examples(texts)
    if encoder.simcse_dropout is None:
        encoder.simcse_dropout = DROPOUT if single else 0.0
    model, max_seq_length = load_encoder(encoder)
    if single:
        check_views_differ(model, first_example(data)["anchor"])
        set_seed(training.seed)  # the check has drawn random numbers
    across = training.world_size > 1  # the texts of every rank are negatives, as in LLM2Vec
    with transformers_errors():
        loss = MultipleNegativesRankingLoss(model, scale=encoder.loss_scale, gather_across_devices=across)
        return SimCSETrainer(
            model=model,
            args=training,
            train_dataset=data,
            loss=loss,
            saved_max_seq_length=max_seq_length,
            stop_after_n_steps=encoder.stop_after_n_steps,
        )
