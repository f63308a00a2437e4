"""A run of a word-level task, from its settings to the saved model."""

import logging
import os
import shlex
from dataclasses import replace
from typing import Any

from transformers import set_seed
from transformers.trainer import OPTIMIZER_NAME

from ...errors import ConfigError
from ...model.sinks import NO_SINKS
from ...verify.mode import sinks_in
from ..checkpoints import checkpoint_to_resume, is_finished, put_aside_checkpoints
from ..common_settings import transformers_errors
from ..mntp.model import load_tokenizer
from ..output_folder import check_space, make_output_dir
from ..progress import hide_bars_in_files
from ..run_report import Report, say_what_is_next
from ..sink_token import token_before, with_sink_token
from .card import write_words_card
from .collator import WordCollator
from .data import Data, Split, load_data
from .evaluation import are_spans, check_seqeval, make_report, most_frequent_labels
from .model import Source, below_of, check_model, find_source, load_model, saved_labels
from .saving import Trained, is_whole, load_classifier, read_trained, save_predictions
from .settings import ModelArguments, Settings
from .tagger import WordTagger
from .tokens import Reading, check_reading, encode
from .trainer import WordsTrainer

logger = logging.getLogger(__name__)
LONGEST = 1024  # tokens of a sentence, where neither the settings nor the tokenizer have a lower limit


def train(settings: Settings) -> None:
    """Train and evaluate as the settings say, and write the result to their output_dir."""
    training, steps = settings.training, settings.task.stop_after_n_steps
    checkpoint = checkpoint_to_resume(training, settings.model.lora_r)
    hide_bars_in_files(training)
    set_seed(training.seed)
    data = load_data(settings)
    trainer, tests = _make_trainer(settings, data)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "words saves parts of the model alone, and can't do that with sharded weights: run it under DDP"
        )
    report = make_report(trainer)
    if training.do_train and checkpoint is None and training.should_save:
        put_aside_checkpoints(str(training.output_dir))
    if training.do_train and training.do_eval:
        _add_baseline("baseline", "each word's commonest label", data, "validation", trainer, report)
        if checkpoint is None:
            report.add("before", "before training", trainer.evaluate_before("before"))
            report.show()
    if training.do_train:
        _train_from(checkpoint, trainer, steps)
    if training.do_eval:
        report.add_result("as it was loaded")
    if training.do_predict:
        if training.do_train:
            _add_baseline("test_baseline", "test data: the commonest", data, "test", trainer, report)
        found = trainer.predict(tests, metric_key_prefix="test")
        trainer.log(found.metrics)
        report.add("test", "test data", found.metrics)
        if trainer.is_world_process_zero():
            save_predictions(str(training.output_dir), found.predictions[0], tests, data.sentences["test"], trainer.labels)
    report.show()
    if training.do_train:
        write_words_card(settings, trainer, report)
        say_what_is_next(trainer, *_next_step(settings, trainer))


def _add_baseline(prefix: str, label: str, data: Data, split: Split, trainer: WordsTrainer, report: Report) -> None:
    found = most_frequent_labels(data.sentences["train"], data.sentences[split], trainer.labels)
    report.add(prefix, label, {f"{prefix}_{name}": value for name, value in found.items()})


def _make_trainer(settings: Settings, data: Data) -> tuple[WordsTrainer, Any]:
    """The trainer, and the test data."""
    model, task, training = settings
    trained = read_trained(model.cls_addr) if model.cls_addr else None
    if trained is not None:
        _take_over(model, trained)
    source = find_source(model, trained.below if trained else None)
    labels, new_classifier = _choose_labels(settings, source, data, trained)
    reading = _choose_reading(settings, trained)
    if are_spans(labels):
        check_seqeval()
    limit, sinks = check_model(source)  # before the sentences are prepared
    tokenizer = _load_tokenizer(model)
    tokenizer, sink_token = with_sink_token(tokenizer, _asked_token(model, source, tokenizer), sinks.num_sink_tokens)
    if not tokenizer.is_fast:
        raise ConfigError("words needs a tokenizer of the tokenizers library, which knows each token's word")
    _fit_for_pipelines(tokenizer)
    check_reading(reading, tokenizer, sinks.num_sink_tokens)
    length = min(filter(None, (task.max_seq_length or LONGEST, tokenizer.model_max_length, limit)))
    if length <= sinks.num_sink_tokens:
        raise ConfigError(f"max_seq_length must be above num_sink_tokens={sinks.num_sink_tokens}; got {length}")
    rows = {split: encode(each, tokenizer, labels, length, reading, split) for split, each in data.sentences.items()}
    tokenizer.backend_tokenizer.no_truncation()  # the last call left its length there
    _check_batches(training, rows.get("train"))
    training.remove_unused_columns = False  # the collator takes what it needs
    loaded = load_model(source, labels, new_classifier=new_classifier)
    _check_ids(loaded, rows)
    tagger = WordTagger(loaded, reading)
    if model.cls_addr:
        _load_classifier(tagger, model.cls_addr)
    if training.do_train:
        _check_space(settings, loaded, reading)
    make_output_dir(str(training.output_dir))
    with transformers_errors():
        trainer = WordsTrainer(
            model=tagger,
            args=training,
            train_dataset=rows.get("train"),
            eval_dataset=rows.get("validation", rows.get("test")),
            data_collator=WordCollator(tokenizer.pad_token_id or 0),
            labels=labels,
            tokenizer=tokenizer,
            sink_token=sink_token,
            below=below_of(source),
            stop_after_n_steps=task.stop_after_n_steps,
        )
    return trainer, rows.get("test")


def _take_over(model: ModelArguments, trained: Trained) -> None:
    """Have the model that a classifier was trained on, where the settings do not say otherwise. Changes them in place."""
    model.lora_r = model.lora_r or trained.facts["lora_r"]
    if model.num_sink_tokens is None:
        model.num_sink_tokens = trained.facts["num_sink_tokens"]
        if model.num_sinkless_layers is None and model.num_sink_tokens:
            model.num_sinkless_layers = trained.facts["num_sinkless_layers"]


def _choose_labels(settings: Settings, source: Source, data: Data, trained: Trained | None) -> tuple[list[str], bool]:
    """The labels that are told apart, and whether the classifier is a new one."""
    model, task, training = settings
    if trained is not None:
        return trained.labels, True  # its weights are put in the place of the new ones
    own = saved_labels(source)
    if own is not None and not task.merge_subwords and task.retroactive_labels != "next_token":
        if not training.do_train or set(data.labels) <= set(own):
            return own, False
    if not training.do_train:
        raise ConfigError(
            f"{model.model_name_or_path} has no classifier to evaluate"
            f"{' that reads labels so' if own is not None else ''}: give do_train, or cls_addr, a folder of this command"
        )
    if len(data.labels) < 2:
        raise ConfigError(f"all words have one label, {data.labels[0]}: there is nothing to tell apart")
    return data.labels, True


def _choose_reading(settings: Settings, trained: Trained | None) -> Reading:
    """Where labels are read: as the settings say, else as the classifier was trained, else at a word's first token."""
    asked, merge = settings.task.retroactive_labels, settings.task.merge_subwords
    reading = trained.reading if trained else Reading()
    reading = reading if asked is None else reading._replace(next_token=asked == "next_token")
    return reading if merge is None else reading._replace(merge=merge)


def _load_tokenizer(model: ModelArguments) -> Any:
    """The tokenizer of the model; that which was saved with the classifier, where one is evaluated."""
    if model.cls_addr and not model.tokenizer_name:
        model = replace(model, tokenizer_name=model.cls_addr, gguf_file=None)
    return load_tokenizer(model)


def _asked_token(model: ModelArguments, source: Source, tokenizer: Any) -> str | None:
    """The sink token of the settings, else that of the step before: of the classifier, or of the last adapter."""
    folders = [*source.adapters, *([model.cls_addr] if model.cls_addr else [])]
    hub = {"cache_dir": model.cache_dir, "token": model.token, "trust_remote_code": model.trust_remote_code}
    return model.sink_token or token_before(tokenizer, folders, **hub)


def _fit_for_pipelines(tokenizer: Any) -> None:
    """Have a tokenizer pad, and give no more than a decoder takes, once it is saved and opened again too."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def _check_batches(training: Any, rows: Any) -> None:
    needed = training.train_batch_size * training.world_size
    if rows is not None and training.dataloader_drop_last and len(rows) < needed:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: a batch takes {needed} sentences, and there are {len(rows)}"
        )


def _check_ids(model: Any, rows: dict[Any, list[dict[str, list[int]]]]) -> None:
    there = len(model.get_input_embeddings().weight)
    largest = max(max(row["input_ids"]) for each in rows.values() for row in each)
    if largest >= there:
        raise ConfigError(
            f"the tokenizer gives the id {largest}, and the model has {there} embeddings: give its own tokenizer"
        )


def _check_space(settings: Settings, model: Any, reading: Reading) -> None:
    training = settings.training
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    result = [w for name, w in model.named_parameters() if "lora_" not in name] if is_whole(reading) else trained
    check_space(str(training.output_dir), result, copies=1)
    if strategy != "no":
        check_space(str(training.output_dir), trained, copies=1 if training.save_only_model else 3)


def _load_classifier(tagger: WordTagger, folder: str) -> None:
    try:
        load_classifier(tagger, folder)
    except ConfigError as error:
        raise ConfigError(f"cls_addr {folder}: {error}") from error
    except Exception as error:  # a broken file raises errors of many classes
        raise ConfigError(f"can't read the classifier in {folder}: {error}") from error


def _train_from(checkpoint: str | None, trainer: WordsTrainer, stop_after_n_steps: int | None) -> None:
    if checkpoint and is_finished(checkpoint, stop_after_n_steps=stop_after_n_steps, max_steps=trainer.args.max_steps):
        trainer.load_finished(checkpoint)
    else:
        if checkpoint and not os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise ConfigError(
                f"{checkpoint} holds no optimizer, as save_only_model asks for, so the run can't go on: give "
                "overwrite_output_dir to start anew, or another folder"
            )
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_metrics("train", result.metrics)
        trainer.check_weights()
    trainer.save_run()


def _next_step(settings: Settings, trainer: WordsTrainer) -> tuple[str, str]:
    """What was written where, and how it is used."""
    model, task, training = settings
    folder, reading = str(training.output_dir), trainer.tagger.reading
    if is_whole(reading):
        needs_import = model.bidirectional
        first = "import bidirect_patch.auto; " if needs_import else ""
        call = f"pipeline('token-classification', {folder!r}, aggregation_strategy='first')('A cat sat down .')"
        written = f"{type(trainer.tagger.model).__name__}, whole, to {folder}"
        return written, f"from Python: {first}from transformers import pipeline; {call}"
    flags = ["--model_name_or_path", str(model.model_name_or_path)]
    optional = {
        "peft_model_name_or_path": model.peft_model_name_or_path,
        "gguf_file": model.gguf_file,
        "layers": model.layers,
        "sink_token": trainer.sink_token,
        "lora_r": model.lora_r or None,
        "cls_addr": folder,
        "task": task.task,
    }
    sinks = sinks_in(trainer.tagger.model)
    optional |= sinks._asdict() if sinks != NO_SINKS else {}
    for name, value in optional.items():
        flags += [f"--{name}", str(value)] if value is not None else []
    flags += [] if model.bidirectional else ["--no_bidirectional"]
    written = (
        f"the classifier{' and its adapter' if model.lora_r else ''} to {folder}, alone: transformers' "
        f"{type(trainer.tagger.model).__name__} reads a word at its own first token, and this one was trained with "
        f"{reading.in_words}"
    )
    return written, f"bidirect-patch words {shlex.join(flags)} --test_file FILE --output_dir TESTED"
