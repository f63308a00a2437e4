"""A run of contrastive training, from its settings to the saved encoder."""

import os
import warnings
from typing import Any

from transformers import set_seed
from transformers.trainer import OPTIMIZER_NAME

from ...attention.versions import OPENS_BIDIRECTIONAL
from ...errors import ConfigError
from ...model.sinks import NO_SINKS
from ...verify.mode import sinks_in
from ..checkpoints import checkpoint_to_resume, is_finished, put_aside_checkpoints
from ..common_settings import transformers_errors
from ..output_folder import make_output_dir
from ..pairs import load_pairs
from ..progress import hide_bars_in_files
from ..run_report import say_what_is_next
from .card import write_encoder_card
from .checks import check_batches, check_known_tokens, check_no_adapter, check_single, check_space_for
from .data import Examples, first_example, load_examples
from .evaluation import PairEvaluator, evaluate_before, make_report
from .instructions import column_prompts
from .loss import distillation_loss, make_loss
from .model import check_views_differ, load_encoder
from .saved_encoder import choose_pooling
from .settings import DROPOUT, PAIR_SCALE, SCALE, EncoderArguments, Settings
from .teacher import add_projection, fit_projection, load_teacher, with_embeddings
from .trainer import SimCSETrainer


def train(settings: Settings) -> None:
    """Train and evaluate as the settings say, and write the result to their output_dir."""
    training, steps = settings.training, settings.encoder.stop_after_n_steps
    checkpoint = checkpoint_to_resume(training, settings.encoder.lora_r)
    hide_bars_in_files(training)
    set_seed(training.seed)
    trainer = _make_trainer(settings)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "simcse merges the adapter into the model that it saves, and can't do that with sharded weights: run it under "
            "DDP instead"
        )
    report = make_report(trainer)
    if training.do_train and checkpoint is None and training.should_save:
        put_aside_checkpoints(str(training.output_dir))
    if training.do_train and settings.encoder.teacher and checkpoint is None:
        fit_projection(trainer.model, trainer.train_dataset, show_progress_bar=not training.disable_tqdm)
    if training.do_train and training.do_eval and checkpoint is None:
        evaluate_before(trainer, report)
    if training.do_train:
        _train_from(checkpoint, trainer, steps)
    if training.do_eval:
        report.add_result("as it was loaded")
        report.show()
    if training.do_train:
        write_encoder_card(settings, trainer, report)
        folder = str(training.output_dir)
        opened = f"SentenceTransformer({folder!r})"
        has_sinks = sinks_in(trainer.model) != NO_SINKS
        if settings.encoder.bidirectional and not OPENS_BIDIRECTIONAL and not has_sinks:
            opened = f"enable_bidirectional({opened})"
        after = ", after import bidirect_patch.auto" if has_sinks else ""
        encode = f"from Python{after}: {opened}.encode(texts)"
        say_what_is_next(trainer, f"the encoder, whole, to {folder}", encode)


def _make_trainer(settings: Settings) -> SimCSETrainer:
    encoder, texts, training = settings
    pairs = load_pairs("validation_file", str(texts.validation_file), texts.cache_dir) if training.do_eval else None
    examples = load_examples(texts) if training.do_train else Examples(None, False, {})
    teacher = None
    if training.do_train and encoder.teacher:
        distillation_loss()  # an error before anything is loaded
        check_single(examples, str(texts.dataset_file_path))
        teacher = load_teacher(encoder.teacher)
    elif training.do_train:
        check_batches(examples, training)
    _fill_in(encoder, examples)
    model, max_seq_length = load_encoder(encoder, examples.prompts)
    if teacher is not None:
        add_projection(model, teacher)
    elif examples.single:
        check_views_differ(model, first_example(examples.data)["anchor"])
        set_seed(training.seed)  # the check has drawn random numbers
    if training.do_train:
        check_known_tokens(model.tokenizer, examples)
        check_space_for(training, model)
    if teacher is not None:
        examples = with_embeddings(examples, teacher, show_progress_bar=not training.disable_tqdm)
        del teacher  # and its memory
    make_output_dir(str(training.output_dir))
    training.prompts = column_prompts(examples.data, examples.prompts, examples.of_one_kind)
    evaluator: Any = None
    if pairs is not None:
        evaluator = PairEvaluator(pairs, training.per_device_eval_batch_size, max_seq_length)
    with transformers_errors():
        return SimCSETrainer(
            model=model,
            args=training,
            train_dataset=examples.data,
            loss=make_loss(model, encoder, gather=training.world_size > 1),
            evaluator=evaluator,
            saved_max_seq_length=max_seq_length,
            stop_after_n_steps=encoder.stop_after_n_steps,
        )


def _train_from(checkpoint: str | None, trainer: SimCSETrainer, stop_after_n_steps: int | None) -> None:
    """Train to the end, from a checkpoint if there is one, and write the result."""
    max_steps = trainer.args.max_steps
    if checkpoint and is_finished(checkpoint, stop_after_n_steps=stop_after_n_steps, max_steps=max_steps):
        trainer.load_finished(checkpoint)
    else:
        if checkpoint and not os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise ConfigError(
                f"{checkpoint} holds no optimizer, as save_only_model asks for, so the run can't go on: give "
                "overwrite_output_dir to start anew, or another folder"
            )
        with warnings.catch_warnings():  # SentenceTransformer has transformers' old name for it alone
            warnings.filterwarnings("ignore", ".*`gradient_checkpointing_enable`", FutureWarning)
            result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_metrics("train", result.metrics)
        trainer.check_weights()
    trainer.save_run()


def _fill_in(encoder: EncoderArguments, examples: Examples) -> None:
    """Set what depends on the model, and on whether the examples are single texts."""
    check_no_adapter(encoder.model_name_or_path)
    encoder.pooling_mode = choose_pooling(encoder.pooling_mode, str(encoder.model_name_or_path))
    if encoder.simcse_dropout is None:
        encoder.simcse_dropout = DROPOUT if examples.single and not encoder.teacher else 0.0
    if encoder.loss_scale is None:
        encoder.loss_scale = SCALE if examples.single else PAIR_SCALE
