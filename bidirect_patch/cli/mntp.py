"""`bidirect-patch mntp`: masked next token prediction, after transformers' run_mlm and LLM2Vec's run_mntp.py."""

import os
from typing import Any

from ..errors import BackendError, ConfigError
from . import one_line


def run(argv: list[str]) -> int:
    """Train and evaluate as `[CONFIG.json] [--name value ...]` says; 0 when done."""
    try:
        import accelerate  # noqa: F401  (transformers' Trainer needs it)
        import datasets  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise BackendError(f"training needs {error.name}: pip install 'bidirect-patch[train]'") from error
    from .arguments import parse

    return train(*parse(argv))


def train(model_settings: Any, data_settings: Any, mntp_settings: Any, training: Any) -> int:
    """Train and evaluate with settings as `arguments.parse` gives them."""
    import torch
    from transformers import set_seed

    from . import data, model, saving
    from .training import MNTPTrainer, ResumableCollator

    checkpoint = _checkpoint(training, saving.last_whole_checkpoint)
    set_seed(training.seed)
    model.check_model(model_settings)  # before the texts are prepared, which takes long
    tokenizer = model.load_tokenizer(model_settings)
    # Evaluation is padded: it runs the causal model too, and older transformers let packed documents see each other.
    train_collator, eval_collator = (
        model.collator(
            tokenizer, data_settings, mntp_settings, ResumableCollator, padding_free=packed, seed=training.seed
        )
        for packed in (data_settings.padding_free, False)
    )
    texts = data.load_texts(model_settings, data_settings, training)
    wanted = [split for split, used in (("train", training.do_train), ("validation", training.do_eval)) if used]
    sequences = {split: data.tokenize(texts[split], split, tokenizer, data_settings, training) for split in wanted}
    if data_settings.streaming and training.max_steps <= 0:
        training.max_steps = mntp_settings.stop_after_n_steps  # a stream has no length to plan a schedule from
    training.remove_unused_columns = False  # the collator takes what it needs
    decoder = model.load_model(model_settings)
    model.add_adapter(decoder, model_settings)
    try:
        os.makedirs(training.output_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {training.output_dir} can't be made: {error.strerror}") from error
    try:
        trainer = MNTPTrainer(
            model=decoder,
            args=training,
            train_dataset=sequences.get("train"),
            eval_dataset=sequences.get("validation"),
            data_collator=train_collator,
            eval_collator=eval_collator,
            tokenizer=tokenizer,
            stop_after_n_steps=mntp_settings.stop_after_n_steps,
        )
    except (ValueError, TypeError, ImportError) as error:  # contradictory settings, or packages that don't fit
        raise ConfigError(one_line(error)) from error
    report = Report(trainer)
    if training.do_train and checkpoint is None and training.should_save:
        saving.put_aside_checkpoints(training.output_dir)
    if training.do_eval and mntp_settings.eval_baselines and checkpoint is None:
        with torch.random.fork_rng(devices=[]):  # training is the same with them and without
            _baselines(trainer, decoder, report)
    if training.do_train:
        if checkpoint and _is_finished(trainer, checkpoint, mntp_settings.stop_after_n_steps):
            trainer.load_finished(checkpoint)
        else:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_metrics("train", result.metrics)
        trainer.save_model()
        trainer.save_state()
    if training.do_eval:
        label = f"after {trainer.state.global_step} steps" if training.do_train else "bidirectional"
        report.add("eval", label, trainer.evaluate())
    report.show()
    if training.push_to_hub:
        trainer.push_to_hub(finetuned_from=model_settings.model_name_or_path)
    return 0


class Report:
    """The evaluations of a run: a line each when it is made, a table at the end, and all_results.json."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.lines = trainer, [f"{'':28}{'loss':>8}{'accuracy':>10}"]

    def add(self, kind: str, label: str, metrics: dict[str, float]) -> None:
        loss, accuracy = metrics[f"{kind}_loss"], metrics[f"{kind}_accuracy"]
        self.lines.append(f"{label:28}{loss:8.3f}{accuracy:10.1%}")
        self.trainer.save_metrics(kind, metrics)

    def show(self) -> None:
        if len(self.lines) > 1 and self.trainer.is_world_process_zero():
            print("masked next token prediction", *self.lines, sep="\n", flush=True)


def _baselines(trainer: Any, decoder: Any, report: Report) -> None:
    """Evaluate before the first step: the causal model that was given, and the same weights bidirectional."""
    from ..patch import bidirectional

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # these evaluate what they have trained, nothing before
        return
    with bidirectional(decoder, enabled=False):
        report.add("causal", "causal, before training", trainer.evaluate(metric_key_prefix="causal"))
    before = trainer.evaluate(metric_key_prefix="before")
    report.add("before", "bidirectional, untrained", before)
    report.show()
    # accelerate takes a model that it prepared for evaluation for one that is ready to be trained, and would leave it
    # without DDP: each rank alone, on its own gradients.
    decoder.__dict__.pop("_is_accelerate_prepared", None)


def _is_finished(trainer: Any, checkpoint: str, stop_after_n_steps: int) -> bool:
    """Whether a checkpoint is at the last step; Trainer would take one more."""
    from transformers import TrainerState

    limits = [stop_after_n_steps, *([trainer.args.max_steps] if trainer.args.max_steps > 0 else [])]
    return TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")).global_step >= min(limits)


def _checkpoint(training: Any, last_whole_checkpoint: Any) -> str | None:
    """Where to resume from, as in run_mlm: the checkpoint asked for, else the newest in output_dir."""
    if not training.do_train:
        return None
    asked = training.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        if not os.path.isfile(os.path.join(asked, "trainer_state.json")):
            raise ConfigError(f"resume_from_checkpoint: {asked} holds no whole checkpoint")
        return asked
    last = last_whole_checkpoint(training.output_dir)
    if asked and str(asked).lower() == "true":
        if last is None:
            raise ConfigError(f"resume_from_checkpoint: there is no whole checkpoint in {training.output_dir}")
        return last
    if training.overwrite_output_dir:
        return None
    if last is None and os.path.isdir(training.output_dir) and os.listdir(training.output_dir):
        raise ConfigError(
            f"output_dir {training.output_dir} isn't empty and holds no checkpoint to resume from: give "
            "overwrite_output_dir, or another folder"
        )
    return last
