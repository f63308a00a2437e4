"""A run of masked next token prediction, from its settings to the saved model."""

import logging
import math
import shlex
from typing import Any

from transformers import PreTrainedModel, set_seed

from ...errors import ConfigError
from ...model.sinks import NO_SINKS, Sinks
from ...verify.mode import sinks_in
from ..checkpoints import checkpoint_to_resume, is_finished, put_aside_checkpoints
from ..common_settings import transformers_errors
from ..lora import trains_rows
from ..output_folder import check_space, make_output_dir
from ..pairs import load_pairs
from ..progress import hide_bars_in_files
from ..run_report import say_what_is_next
from ..sink_token import with_sink_token
from .card import write_mntp_card
from .collator import make_collator
from .data import Beginning, load_sequences, sequence_length
from .evaluation import evaluate_baselines, make_report
from .model import adapter_of, add_adapter, check_model, load_model, load_tokenizer
from .sentence_pairs import SentencePairs
from .settings import ModelArguments, Settings
from .trainer import MNTPTrainer
from .vocabulary import add_mask_token, add_rows

logger = logging.getLogger(__name__)


def train(settings: Settings) -> None:
    """Train and evaluate as the settings say, and write the result to their output_dir."""
    training = settings.training
    checkpoint = checkpoint_to_resume(training, settings.model.lora_r)
    hide_bars_in_files(training)
    set_seed(training.seed)
    trainer, model = _make_trainer(settings)
    report = make_report(trainer)
    if training.do_train and checkpoint is None and training.should_save:
        put_aside_checkpoints(str(training.output_dir))
    if training.do_eval and settings.mntp.eval_baselines and checkpoint is None:
        evaluate_baselines(trainer, model, report)
    if training.do_train:
        _train_from(checkpoint, trainer, settings.mntp.stop_after_n_steps)
    if training.do_eval:
        report.add_result("bidirectional")
    report.show()
    if training.do_train:
        write_mntp_card(settings, trainer, model, report)
        adapter = adapter_of(model)
        new_rows = adapter is not None and trains_rows(adapter)
        of_base = _flags_of_base(settings.model, trainer.sink_token, sinks_in(model)) if adapter is not None else []
        say_what_is_next(trainer, *_next_step(settings.model, str(training.output_dir), new_rows, of_base))
    if training.push_to_hub:
        trainer.push_to_hub(finetuned_from=settings.model.model_name_or_path)


def _flags_of_base(model: ModelArguments, sink_token: str | None, sinks: Sinks) -> list[str]:
    """The flags by which the next step makes of the base model, and of its tokenizer, what the adapter was trained on."""
    flags = {"layers": model.layers, "sink_token": sink_token}
    if sinks != NO_SINKS:
        flags |= sinks._asdict()
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def _next_step(model: ModelArguments, folder: str, new_rows: bool, of_base: list[str]) -> tuple[str, str]:
    """What was written where, and the command of the next step, if one command is enough."""
    base = ["--model_name_or_path", str(model.model_name_or_path) if model.lora_r else folder]
    if model.lora_r and model.gguf_file:
        base += ["--gguf_file", model.gguf_file]
    adapter = ["--peft_model_name_or_path", folder] if model.lora_r else []
    flags = shlex.join([*base, *adapter, *of_base, "--do_train", "--dataset_file_path", "TEXTS", "--output_dir", "ENCODER"])
    written = f"the adapter of {model.model_name_or_path} to {folder}" if adapter else f"the model to {folder}"
    if adapter and (new_rows or model.tokenizer_name or model.model_revision != "main"):
        return written, "open it with its own tokenizer and revision: see MNTP in bidirect_patch/cli/README.md"
    return written, f"bidirect-patch simcse {flags}"


def _make_trainer(settings: Settings) -> tuple[MNTPTrainer, PreTrainedModel]:
    training = settings.training
    pairs = load_pairs("eval_sts", settings.mntp.eval_sts, settings.model.cache_dir) if settings.mntp.eval_sts else None
    limit, sinks = check_model(settings.model)  # before the texts are prepared, which takes long
    tokenizer, sink_token = with_sink_token(load_tokenizer(settings.model), settings.model.sink_token, sinks.num_sink_tokens)
    sentence_pairs = None
    if pairs:
        pooling = settings.mntp.eval_sts_pooling or settings.mntp.pooling_mode or "mean"
        sentence_pairs = SentencePairs(pairs, tokenizer, limit, pooling, sinks.num_sink_tokens)
    length = settings.data.max_seq_length = _fitting_length(sequence_length(tokenizer, settings.data), limit)
    if length <= sinks.num_sink_tokens:
        raise ConfigError(f"max_seq_length must be above num_sink_tokens={sinks.num_sink_tokens}; got {length}")
    new_ids = add_mask_token(tokenizer, settings.mntp)
    # Evaluation is padded: it runs the causal model too, and older releases of transformers let packed documents see
    # each other.
    train_collator, eval_collator = (
        make_collator(
            tokenizer,
            settings.data,
            settings.mntp,
            padding_free=padding_free,
            seed=training.seed,
            num_sink_tokens=sinks.num_sink_tokens,
        )
        for padding_free in (settings.data.padding_free, False)
    )
    first_id = None if sink_token is None else tokenizer.convert_tokens_to_ids(sink_token)
    beginning = Beginning(first_id, max(1, sinks.num_sink_tokens))
    sequences = load_sequences(tokenizer, settings.model, settings.data, training, beginning)
    _check_batches(settings, sequences.get("train"))
    if settings.data.streaming and training.max_steps <= 0:
        training.max_steps = settings.mntp.stop_after_n_steps  # a stream has no length to plan a schedule from
    training.remove_unused_columns = False  # the collator takes what it needs
    model = load_model(settings.model)
    new_ids += add_rows(model, tokenizer)
    add_adapter(model, settings.model, sorted(set(new_ids)))
    _check_space(settings, model)
    make_output_dir(str(training.output_dir))
    with transformers_errors():
        trainer = MNTPTrainer(
            model=model,
            args=training,
            train_dataset=sequences.get("train"),
            eval_dataset=sequences.get("validation"),
            data_collator=train_collator,
            eval_collator=eval_collator,
            sentence_pairs=sentence_pairs,
            tokenizer=tokenizer,
            sink_token=sink_token,
            stop_after_n_steps=settings.mntp.stop_after_n_steps,
        )
    return trainer, model


def _fitting_length(length: int, limit: int | None) -> int:
    """The length of sequences that a model can read, where `limit` is the number of its positions."""
    if limit is None or length <= limit:
        return length
    logger.warning("max_seq_length is %d instead of %d, because the model has no more positions", limit, length)
    return limit


def _check_batches(settings: Settings, sequences: Any) -> None:
    """Raise ConfigError if no batch can be filled, where batches that are not full are dropped."""
    training = settings.training
    if sequences is None or settings.data.streaming or not training.dataloader_drop_last:
        return
    needed = training.train_batch_size * training.world_size
    if len(sequences) < needed:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: a batch takes {needed} sequences, and there are {len(sequences)}"
        )


def _check_space(settings: Settings, model: PreTrainedModel) -> None:
    training = settings.training
    if training.do_train and training.should_save:
        strategy = getattr(training.save_strategy, "value", training.save_strategy)
        with_optimizer = not training.save_only_model  # whose state is two numbers for each
        copies = 1 if strategy == "no" else 4 if with_optimizer else 2  # the result, and a checkpoint
        check_space(str(training.output_dir), (p for p in model.parameters() if p.requires_grad), copies)


def _check_learned(trainer: MNTPTrainer, loss: float) -> None:
    """Raise ConfigError after a run that has trained nothing, before it is saved."""
    if loss == 0:
        raise ConfigError(
            "nothing was trained: no token was chosen to be predicted; give a larger mlm_probability or more text"
        )
    trainer.check_weights()


def _train_from(checkpoint: str | None, trainer: MNTPTrainer, stop_after_n_steps: int) -> None:
    if checkpoint and is_finished(checkpoint, stop_after_n_steps=stop_after_n_steps, max_steps=trainer.args.max_steps):
        trainer.load_finished(checkpoint)
    else:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        # A run that was resumed may have had few steps left.
        _check_learned(trainer, result.training_loss if checkpoint is None else math.inf)
        trainer.save_metrics("train", result.metrics)
    trainer.save_run()
