"""The settings of `bidirect-patch words`.

The names are those of LLM2Vec's run_word_task.py and test_word_task.py and of transformers' TrainingArguments.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import TrainingArguments

from ...errors import ConfigError
from ..common_settings import check_counts, check_dropout, check_given, check_model_settings, parse_settings
from ..mntp import settings as mntp
from ..output_folder import check_output_dir
from ..ranges import LONGEST_SEQUENCE, Range, check_range

RetroactiveLabels = Literal["same_token", "next_token"]
METRICS = ("loss", "accuracy", "f1", "precision", "recall")  # what an evaluation gives, the last three of spans alone


@dataclass
class ModelArguments(mntp.ModelArguments):
    """The model, the adapter to merge into it, and what is trained on top."""

    lora_r: int = field(
        default=0, metadata={"help": "Rank of LoRA; 0 trains the linear layer alone, on frozen states."}
    )
    peft_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its adapter of the step before (MNTP, SimCSE), merged into it first."}
    )
    peft_addr: str | None = field(default=None, metadata={"help": "LLM2Vec's name for peft_model_name_or_path."})
    cls_addr: str | None = field(
        default=None,
        metadata={"help": "Evaluate the classifier in this folder: a checkpoint or a result of this command."},
    )
    model_class: Literal["custom", "auto"] = field(default="custom", metadata={"help": "custom: a decoder."})
    bidirectional: bool = field(default=True, metadata={"help": "Use bidirectional attention."})
    classifier_dropout: float = field(default=0.1, metadata={"help": "Dropout before the linear layer."})


@dataclass
class TaskArguments:
    """The words and their labels, and where a label is read."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Words and labels: .conllu, .iob2, .conll (CoNLL-2003's columns) or .jsonl files, or folders of them."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on once, at the end."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub, or a folder of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    task: str | None = field(
        default=None,
        metadata={
            "help": "The column of labels: pos_tags, chunk_tags, ner_tags, ... Default: the only one, else pos_tags."
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the columns of .conll files: tokens, and one for each kind of label; _: none."},
    )
    retroactive_labels: RetroactiveLabels | None = field(
        default=None,
        metadata={
            "help": "Read a word's label at its own tokens, or each at the token before (after MNTP). Default: as cls_addr was "
            "trained, else same_token."
        },
    )
    merge_subwords: bool | None = field(
        default=None,
        metadata={
            "help": "Read the mean of all tokens of a word, not the first alone. Default: as cls_addr was trained, else false."
        },
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per sentence, at most the limit of tokenizer and model. Default: 1024."}
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training sentences to evaluate on, if there is no data for validation."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many sentences at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many at most."})
    stop_after_n_steps: int | None = field(default=None, metadata={"help": "Stop here, wherever the schedule is."})


@dataclass
class WordsTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with what the newest release no longer has."""

    output_dir: str | None = field(default=None, metadata={"help": "Where checkpoints and the result are written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew even if output_dir holds something, instead of resuming from it."}
    )


ABOUT = """\
Train and evaluate a word-level task: parts of speech, chunks, names. A linear
layer reads the states of each word's tokens; the model under it is bidirectional
and frozen, or gets a LoRA adapter. Written is a model for transformers'
pipeline("token-classification"). The same command again resumes from the last
checkpoint.

examples (MODEL is a folder or a name on the hub):

  # parts of speech, on frozen states; a sink token is put before each sentence
  bidirect-patch words --model_name_or_path MODEL --train_file dev.conllu \\
    --test_file test.conllu --num_sink_tokens 1 --do_train --output_dir tagger

  # names, with LoRA; the checkpoint with the best F1 is the result
  bidirect-patch words --model_name_or_path MODEL --train_file train.iob2 \\
    --validation_file dev.iob2 --do_train --do_eval --lora_r 16 \\
    --eval_strategy steps --eval_steps 100 --save_steps 100 \\
    --load_best_model_at_end --metric_for_best_model f1 --output_dir tagger

  # a settings file, as LLM2Vec publishes them
  bidirect-patch words train_configs/word-task/Mistral-bi-mntp.json
  bidirect-patch words test_configs/word-task/Mistral-bi-mntp.json
"""

PRESETS = {
    "small": {
        "num_sink_tokens": 1,
        "max_seq_length": 256,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "max_steps": 200,
    }
}

# A flag that names words puts aside those of the settings file that contradict it.
REPLACES = {
    "dataset_name": ("dataset_config_name", "train_file", "validation_file", "test_file"),
    "train_file": ("dataset_name", "dataset_config_name", "validation_file", "test_file"),
    "validation_file": ("dataset_name", "dataset_config_name"),
    "test_file": ("dataset_name", "dataset_config_name"),
    "dataset_config_name": ("train_file", "validation_file", "test_file"),
}

KINDS = (ModelArguments, TaskArguments, WordsTrainingArguments)


class Settings(NamedTuple):
    """All settings of the command."""

    model: ModelArguments
    task: TaskArguments
    training: WordsTrainingArguments


def parse(argv: list[str]) -> Settings:
    """Read and check `[CONFIG.json] [--name value ...]`.

    Raises:
        ConfigError: A file or a setting cannot be used. The message names it.
    """
    parsed, output_dir = parse_settings(KINDS, "words", argv, REPLACES, presets=PRESETS, about=ABOUT)
    settings = Settings(*parsed)
    model, task, training = settings
    _check_what_to_do(settings)
    check_given("model_name_or_path", model.model_name_or_path, "a folder or hub name of a causal model")
    check_output_dir(output_dir, "a folder for checkpoints and the result")
    _check_data(task, training)
    check_model_settings(model)
    _check_model(model)
    check_dropout(model, "classifier_dropout")
    check_range("max_seq_length", task.max_seq_length, Range(2, LONGEST_SEQUENCE))
    check_counts(task, "max_train_samples", "max_eval_samples", "stop_after_n_steps")
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):
        if getattr(training, name, None):
            raise ConfigError(f"{name} is not for words: take it out")
    metric = str(training.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise ConfigError(f"metric_for_best_model must be {', '.join(METRICS[:-1])} or {METRICS[-1]}; got {metric!r}")
    return settings


def _check_what_to_do(settings: Settings) -> None:
    model, task, training = settings
    if task.test_file:
        training.do_predict = True
    if not (training.do_train or training.do_eval or training.do_predict):
        if not model.cls_addr:
            raise ConfigError("nothing to do: give do_train, do_eval, or a test_file")
        training.do_predict = True  # as LLM2Vec's test_word_task.py does
    if training.do_train and model.cls_addr:
        raise ConfigError("cls_addr names a classifier to evaluate, and do_train trains a new one: give one of them")


def _check_model(model: ModelArguments) -> None:
    if model.model_class != "custom":
        raise ConfigError(
            "model_class=auto is for encoders such as BERT, which need no patch: train those with transformers' own "
            "AutoModelForTokenClassification"
        )
    if model.peft_addr:
        if model.peft_model_name_or_path not in (None, model.peft_addr):
            raise ConfigError("peft_addr is another name of peft_model_name_or_path: give one of them")
        model.peft_model_name_or_path = model.peft_addr
    if not model.use_fast_tokenizer:
        raise ConfigError(
            "words needs a tokenizer of the tokenizers library, which knows each token's word: use_fast_tokenizer"
        )


def _check_data(task: TaskArguments, training: WordsTrainingArguments) -> None:
    if task.dataset_name and (task.train_file or task.validation_file or task.test_file):
        raise ConfigError("give dataset_name or files, not both")
    for asked, what, files in (
        (training.do_train, "do_train", ("train_file",)),
        (training.do_eval, "do_eval", ("validation_file", "train_file")),
        (training.do_predict, "do_predict", ("test_file",)),
    ):
        if asked and not (task.dataset_name or any(getattr(task, name) for name in files)):
            raise ConfigError(f"{what} needs dataset_name or {' or '.join(files)}")
    if not 0 < task.validation_split_percentage < 100:
        raise ConfigError(f"validation_split_percentage must be from 1 to 99; got {task.validation_split_percentage}")
    if task.columns is not None and ("tokens" not in task.columns or len(set(task.columns) - {"_"}) < 2):
        raise ConfigError(f"columns must name tokens and a kind of label at least; got {' '.join(task.columns)}")
