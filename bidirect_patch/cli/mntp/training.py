"""A run of masked next token prediction, from its settings to the saved model."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ...errors import ConfigError
from ..checkpoints import checkpoint_to_resume, put_aside_checkpoints, train_from
from ..settings import transformers_errors
from .collator import make_collator
from .data import load_sequences
from .evaluation import evaluate_baselines, make_report
from .model import add_adapter, check_model, load_model, load_tokenizer
from .settings import Settings
from .trainer import MNTPTrainer


def train(settings: Settings) -> None:
    """Train and evaluate as the settings say, and write the result to their output_dir."""
    training = settings.training
    checkpoint = checkpoint_to_resume(training)
    set_seed(training.seed)
    trainer, model = _make_trainer(settings)
    report = make_report(trainer)
    if training.do_train and checkpoint is None and training.should_save:
        put_aside_checkpoints(str(training.output_dir))
    if training.do_eval and settings.mntp.eval_baselines and checkpoint is None:
        with torch.random.fork_rng(devices=[]):  # so that training is the same without baselines
            evaluate_baselines(trainer, model, report)
    if training.do_train:
        train_from(checkpoint, trainer, settings.mntp.stop_after_n_steps)
    if training.do_eval:
        label = f"after {trainer.state.global_step} steps" if training.do_train else "bidirectional"
        report.add("eval", label, trainer.evaluate())
    report.show()
    if training.push_to_hub:
        trainer.push_to_hub(finetuned_from=settings.model.model_name_or_path)


def _make_trainer(settings: Settings) -> tuple[MNTPTrainer, PreTrainedModel]:
    training = settings.training
    check_model(settings.model)  # before the texts are prepared, which takes long
    tokenizer = load_tokenizer(settings.model)
    # Evaluation is padded: it runs the causal model too, and older releases of transformers let packed documents see
    # each other.
    train_collator, eval_collator = (
        make_collator(tokenizer, settings.data, settings.mntp, padding_free=padding_free, seed=training.seed)
        for padding_free in (settings.data.padding_free, False)
    )
    sequences = load_sequences(tokenizer, settings.model, settings.data, training)
    if settings.data.streaming and training.max_steps <= 0:
        training.max_steps = settings.mntp.stop_after_n_steps  # a stream has no length to plan a schedule from
    training.remove_unused_columns = False  # the collator takes what it needs
    model = load_model(settings.model)
    add_adapter(model, settings.model)
    _make_folder(training.output_dir)
    with transformers_errors():
        trainer = MNTPTrainer(
            model=model,
            args=training,
            train_dataset=sequences.get("train"),
            eval_dataset=sequences.get("validation"),
            data_collator=train_collator,
            eval_collator=eval_collator,
            tokenizer=tokenizer,
            stop_after_n_steps=settings.mntp.stop_after_n_steps,
        )
    return trainer, model


def _make_folder(path: Any) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {path} can't be made: {error.strerror}") from error
