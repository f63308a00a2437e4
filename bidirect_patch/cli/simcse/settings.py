"""The settings of `bidirect-patch simcse`.

The names and defaults are those of LLM2Vec's run_simcse.py and run_supervised.py.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sentence_transformers import SentenceTransformerTrainingArguments

from ...errors import ConfigError
from ..common_settings import (
    CommonModelArguments,
    check_counts,
    check_dropout,
    check_given,
    check_model_settings,
    check_output_dir,
    parse_settings,
)

DROPOUT = 0.3  # the default of simcse_dropout for single texts, as in LLM2Vec's files
DROPOUTS = ("attention_dropout", "attn_pdrop")  # the names that configs have for the dropout of attention
SCALE, PAIR_SCALE = 20.0, 50.0  # the defaults of loss_scale for single texts and for pairs, as in LLM2Vec's files
METRICS = ("spearman_cosine", "pearson_cosine")  # what an evaluation gives
E5 = "E5"  # the dataset_name whose instructions are known

PoolingMode = Literal["mean", "weighted_mean", "eos_token"]


@dataclass
class EncoderArguments(CommonModelArguments):
    """The model, the adapter to merge into it, the adapter to train, and the loss."""

    peft_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its adapter of the step before (MNTP), merged into it first."}
    )
    bidirectional: bool = field(default=True, metadata={"help": "Train with bidirectional attention."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per text in training. Default: the model's limit."}
    )
    encode_max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per text that the result reads. Default: the model's limit."}
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Put the tokenizer's chat template round each text, now and when it encodes."}
    )
    pooling_mode: PoolingMode | None = field(
        default=None, metadata={"help": "How token vectors become one. Default: as an encoder was saved, else mean."}
    )
    simcse_dropout: float | None = field(
        default=None,
        metadata={"help": f"Dropout of attention (no other) while training; {DROPOUT} for single texts, else none."},
    )
    loss_class: Literal["HardNegativeNLLLoss"] = field(
        default="HardNegativeNLLLoss", metadata={"help": "Cross-entropy over cosines with the batch's positives."}
    )
    loss_scale: float | None = field(
        default=None, metadata={"help": f"Factor on the cosines; {SCALE} for single texts, else {PAIR_SCALE}."}
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Texts encoded at a time (GradCache): the memory of these for any batch."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Train the first so many numbers of an embedding too, for each number given."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Distil this finished encoder: train each single text towards the embedding that it gives. A folder or hub "
            "name for sentence-transformers."
        },
    )
    stop_after_n_steps: int | None = field(default=None, metadata={"help": "Stop here, wherever the schedule is."})
    experiment_id: str | None = field(default=None, metadata={"help": "A label of your own."})


@dataclass
class TextArguments:
    """The texts, pairs or triplets."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "E5 for its instructions; else Wiki1M or a label of your own."}
    )
    dataset_file_path: str | None = field(
        default=None, metadata={"help": "Lines of text (.txt), .jsonl or .csv of columns, or a folder of such files."}
    )
    instruction_file: str | None = field(
        default=None,
        metadata={"help": "JSON of tasks (files without their ending) and instructions. E5 has its own by default."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Evaluate on this .csv or .jsonl of sentence1, sentence2 and score."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many at most."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the data's cache is kept."})


@dataclass
class SimCSETrainingArguments(SentenceTransformerTrainingArguments):
    """sentence-transformers' training arguments, with what transformers' newest release no longer has."""

    output_dir: str | None = field(default=None, metadata={"help": "Where the result is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew even if output_dir holds something, instead of resuming from it."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute a layer again in its backward pass instead of keeping all of it."}
    )
    metric_for_best_model: str | None = field(
        default="spearman_cosine", metadata={"help": "spearman_cosine or pearson_cosine, for load_best_model_at_end."}
    )


ABOUT = """\
Train a bidirectional encoder by contrast: on single texts (SimCSE, each text
twice under dropout), or on pairs and triplets. Written is a folder for
sentence-transformers, every adapter merged. The same command again resumes from
the last checkpoint.

examples (MODEL is a folder or a name on the hub):

  # SimCSE on a file of texts, after `bidirect-patch mntp`
  bidirect-patch simcse --model_name_or_path MODEL \\
    --peft_model_name_or_path mntp_out --dataset_file_path texts.txt \\
    --do_train --max_steps 1000 --output_dir encoder

  # pairs (query, positive), with Spearman's correlation before and after
  bidirect-patch simcse --model_name_or_path MODEL \\
    --dataset_file_path pairs.jsonl --validation_file sts.csv --do_train \\
    --output_dir encoder

  # towards the embeddings of a finished encoder
  bidirect-patch simcse --model_name_or_path MODEL --teacher ENCODER \\
    --dataset_file_path texts.txt --do_train --output_dir encoder

  # a settings file, as LLM2Vec publishes them
  bidirect-patch simcse train_configs/simcse/MetaLlama3.json
"""

PRESETS = {
    "small": {
        "num_sink_tokens": 1,
        "num_sinkless_layers": 1,
        "lora_r": 16,
        "lora_dropout": 0.0,
        "max_seq_length": 32,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-4,
        "warmup_steps": 10,
        "max_steps": 120,
        "gradient_checkpointing": False,
    }
}

KINDS = (EncoderArguments, TextArguments, SimCSETrainingArguments)


class Settings(NamedTuple):
    """All settings of the command."""

    encoder: EncoderArguments
    texts: TextArguments
    training: SimCSETrainingArguments


def parse(argv: list[str]) -> Settings:
    """Read and check `[CONFIG.json] [--name value ...]`.

    Raises:
        ConfigError: A file or a setting cannot be used. The message names it.
    """
    parsed, output_dir = parse_settings(KINDS, "simcse", argv, presets=PRESETS, about=ABOUT)
    settings = Settings(*parsed)
    encoder, texts, training = settings
    _check_what_to_do(texts, training)
    check_given("model_name_or_path", encoder.model_name_or_path, "a folder or hub name of a model")
    check_output_dir(output_dir, "a folder for the result")
    check_dropout(encoder, "simcse_dropout")
    check_model_settings(encoder)
    check_counts(encoder, "max_seq_length", "encode_max_seq_length", "stop_after_n_steps", "mini_batch_size")
    check_counts(texts, "max_train_samples")
    _check_loss(encoder)
    for name in ("label_smoothing_factor", "neftune_noise_alpha", "group_by_length"):
        if getattr(training, name, None) or getattr(training, "train_sampling_strategy", None) == name:
            raise ConfigError(f"{name} is not for simcse: take it out")
    if training.prompts:
        raise ConfigError("prompts is set from the instructions: give instruction_file")
    if encoder.chat_template and encoder.sink_token:
        raise ConfigError("a chat template begins with tokens of its own: give chat_template or sink_token, not both")
    if encoder.chat_template and (texts.instruction_file or texts.dataset_name == E5):
        raise ConfigError("instructions can't be left out of pooling under a chat template: give no chat_template")
    return settings


def _check_what_to_do(texts: TextArguments, training: SimCSETrainingArguments) -> None:
    if texts.validation_file:
        training.do_eval = True
    if not (training.do_train or training.do_eval):
        raise ConfigError("nothing to do: give do_train, validation_file or both")
    if training.do_train:
        what = "a file of texts, pairs or triplets, or a folder of such files"
        check_given("dataset_file_path", texts.dataset_file_path, what)
    if training.do_eval:
        check_given("validation_file", texts.validation_file, "a .csv or .jsonl file of sentence1, sentence2 and score")
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    if metric not in METRICS:
        raise ConfigError(f"metric_for_best_model must be {' or '.join(METRICS)}; got {metric}")


def _check_loss(encoder: EncoderArguments) -> None:
    if encoder.loss_scale is not None and not 0 < encoder.loss_scale < math.inf:
        raise ConfigError(f"loss_scale must be above 0; got {encoder.loss_scale}")
    if min(encoder.matryoshka_dims or [1]) < 1:
        raise ConfigError(f"matryoshka_dims must be 1 or more each; got {encoder.matryoshka_dims}")
    of_contrast = [name for name in ("loss_scale", "mini_batch_size", "matryoshka_dims") if getattr(encoder, name) is not None]
    if encoder.teacher and of_contrast:
        raise ConfigError(f"{', '.join(of_contrast)}: a setting of the contrastive loss, which a teacher replaces; leave it out")
