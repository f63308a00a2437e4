"""A run of contrastive training, from its settings to the saved encoder."""

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from ...errors import ConfigError
from ..settings import transformers_errors
from .data import first_example, load_examples
from .instructions import column_prompts
from .model import check_views_differ, load_encoder
from .settings import DROPOUT, PAIR_SCALE, SCALE, Settings
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
    examples = load_examples(texts)
    if encoder.simcse_dropout is None:
        encoder.simcse_dropout = DROPOUT if examples.single else 0.0
    if encoder.loss_scale is None:
        encoder.loss_scale = SCALE if examples.single else PAIR_SCALE
    model, max_seq_length = load_encoder(encoder, examples.prompts)
    if examples.single:
        check_views_differ(model, first_example(examples.data)["anchor"])
        set_seed(training.seed)  # the check has drawn random numbers
    training.prompts = column_prompts(examples.data, examples.prompts)
    across = training.world_size > 1  # the texts of every rank are negatives, as in LLM2Vec
    with transformers_errors():
        loss = MultipleNegativesRankingLoss(model, scale=encoder.loss_scale, gather_across_devices=across)
        return SimCSETrainer(
            model=model,
            args=training,
            train_dataset=examples.data,
            loss=loss,
            saved_max_seq_length=max_seq_length,
            stop_after_n_steps=encoder.stop_after_n_steps,
        )
