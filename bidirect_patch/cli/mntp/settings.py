"""The settings of `bidirect-patch mntp`.

The names and defaults are those of LLM2Vec's run_mntp.py and of transformers' TrainingArguments.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, NamedTuple

from transformers import TrainingArguments

from ...errors import ConfigError
from ..common_settings import CommonModelArguments, check_counts, check_given, check_model_settings, parse_settings
from ..output_folder import check_output_dir
from ..ranges import LONGEST_SEQUENCE, WORKERS, Range, check_range

PoolingMode = Literal["mean", "weighted_mean"]


@dataclass
class ModelArguments(CommonModelArguments):
    """Which model and tokenizer, how they are loaded, and the adapter to train."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it isn't the model's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data sets."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the tokenizers library."})
    low_cpu_mem_usage: bool = field(default=False, metadata={"help": "Load without a second copy of the weights."})


@dataclass
class DataArguments:
    """Which texts are used, and how they become sequences."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub, or a folder of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text (.txt), JSON lines (.json, .jsonl) or .csv: files, and folders of such files."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training texts to evaluate on, if no texts for validation are given."},
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per sequence, at most the limit of tokenizer and model. Default: 1024."}
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line is a sequence of its own, instead of chunks of one long text."}
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the longest."})
    padding_free: bool = field(default=False, metadata={"help": "Pack each batch into one row without padding."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many sequences at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many at most."})
    streaming: bool = field(default=False, metadata={"help": "Read the texts while the model trains."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if it was done before."})


@dataclass
class MNTPArguments:
    """How tokens are masked, and when training stops."""

    mlm_probability: list[float] = field(
        default_factory=lambda: [0.15],
        metadata={"help": "Share of tokens to predict, in (0, 1]; or two: each text's share is drawn between them."},
    )
    mask_token_type: Literal["blank", "eos", "mask"] = field(
        default="blank",
        metadata={"help": "What hides a token if the tokenizer has no mask token: _, its end token, or <mask>, added."},
    )
    mask_token: str | None = field(default=None, metadata={"help": "Hide tokens with this one instead."})
    data_collator_type: Literal["default", "all_mask"] = field(
        default="default", metadata={"help": "Mask, random token or unchanged 80/10/10; or always the mask."}
    )
    stop_after_n_steps: int = field(default=10000, metadata={"help": "Stop here, wherever the schedule is."})
    eval_sts: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate the encoder too, in each evaluation, on this .csv or .jsonl of sentence1, sentence2 and "
            "score: Spearman's correlation of the scores with the cosines. Sentences are cut at 1024 tokens, or at the "
            "limit of tokenizer or model."
        },
    )
    eval_sts_pooling: PoolingMode | None = field(
        default=None,
        metadata={"help": "How the token vectors of a sentence become one for eval_sts. Default: pooling_mode, else mean."},
    )
    pooling_mode: PoolingMode | None = field(
        default=None, metadata={"help": "A setting of simcse, so that one file serves both commands; see eval_sts_pooling."}
    )
    eval_baselines: bool = field(
        default=True,
        metadata={"help": "With do_eval, evaluate both models before the first step (not under FSDP or DeepSpeed)."},
    )


@dataclass
class MNTPTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with what the newest release no longer has."""

    output_dir: str | None = field(default=None, metadata={"help": "Where checkpoints and the result are written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew even if output_dir holds something, instead of resuming from it."}
    )


ABOUT = """\
Train a causal model for masked next token prediction: it is made bidirectional,
tokens of the texts are hidden, and it learns to predict them. Written are a
LoRA adapter (with --lora_r 0 the whole model), the tokenizer and checkpoints.
The same command again resumes from the last checkpoint.

examples (MODEL is a folder or a name on the hub):

  # 1000 steps on a file of texts, and the loss on a part that is held out
  bidirect-patch mntp --model_name_or_path MODEL --train_file texts.txt \\
    --do_train --do_eval --max_steps 1000 --output_dir mntp_out

  # a settings file, as LLM2Vec publishes them, and one setting changed
  bidirect-patch mntp train_configs/mntp/MetaLlama3.json --learning_rate 1e-4

  # only the loss of a model
  bidirect-patch mntp --model_name_or_path MODEL --validation_file texts.txt \\
    --do_eval --output_dir eval_out
"""

PRESETS = {
    "small": {
        "num_sink_tokens": 1,
        "num_sinkless_layers": 1,
        "lora_r": 16,
        "lora_dropout": 0.0,
        "mlm_probability": 0.3,
        "data_collator_type": "all_mask",
        "max_seq_length": 128,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "max_steps": 100,
    }
}

# A flag that names texts puts aside the texts of the settings file: all of them, or those that contradict it.
REPLACES = {
    "dataset_name": ("dataset_config_name", "train_file", "validation_file"),
    "train_file": ("dataset_name", "dataset_config_name", "validation_file"),
    "validation_file": ("dataset_name", "dataset_config_name"),
    "dataset_config_name": ("train_file", "validation_file"),
}

SPEARMAN = "sts_spearman"  # of an evaluation with eval_sts
METRICS = ("loss", "accuracy", SPEARMAN)

KINDS = (ModelArguments, DataArguments, MNTPArguments, MNTPTrainingArguments)


class Settings(NamedTuple):
    """All settings of the command."""

    model: ModelArguments
    data: DataArguments
    mntp: MNTPArguments
    training: MNTPTrainingArguments


def parse(argv: list[str]) -> Settings:
    """Read and check `[CONFIG.json] [--name value ...]`.

    Raises:
        ConfigError: A file or a setting cannot be used. The message names it.
    """
    parsed, output_dir = parse_settings(KINDS, "mntp", argv, REPLACES, presets=PRESETS, about=ABOUT)
    settings = Settings(*parsed)
    training = settings.training
    if not (training.do_train or training.do_eval):
        raise ConfigError("nothing to do: give do_train, do_eval or both")
    check_given("model_name_or_path", settings.model.model_name_or_path, "a folder or hub name of a causal model")
    check_output_dir(output_dir, "a folder for checkpoints and the result")
    _check_data(settings.data, training.do_train, training.do_eval)
    check_model_settings(settings.model)
    _check_shares(settings.mntp.mlm_probability)
    check_counts(settings.mntp, "stop_after_n_steps")
    _check_training(training)
    _check_sts(settings.mntp, training)
    return settings


def _check_shares(shares: list[float]) -> None:
    for share in shares:
        check_range("mlm_probability", share, Range(0, 1, open_low=True))
    if len(shares) > 2 or shares != sorted(shares):
        given = " ".join(map(str, shares))
        raise ConfigError(f"mlm_probability takes one number, or two, the lower one first; got {given}")


def _check_training(training: MNTPTrainingArguments) -> None:
    metric = training.metric_for_best_model
    if metric is not None and str(metric).removeprefix("eval_") not in METRICS:
        raise ConfigError(f"metric_for_best_model must be {', '.join(METRICS[:-1])} or {METRICS[-1]}; got {metric!r}")
    if getattr(training, "use_liger_kernel", False) and find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel needs liger-kernel: pip install 'bidirect-patch[engines]', or take it out")
    strategy = getattr(training, "train_sampling_strategy", None)
    if getattr(strategy, "value", strategy) == "batch_rebalance":
        raise ConfigError("train_sampling_strategy=batch_rebalance is not for mntp: give random or group_by_length")


def _check_sts(mntp: MNTPArguments, training: MNTPTrainingArguments) -> None:
    if mntp.eval_sts and not training.do_eval:
        raise ConfigError("eval_sts is a part of an evaluation, and there is none: give do_eval, or eval_strategy")
    is_metric = str(training.metric_for_best_model).removeprefix("eval_") == SPEARMAN
    if is_metric and not mntp.eval_sts:
        raise ConfigError(f"metric_for_best_model={SPEARMAN} needs eval_sts, a file of sentence1, sentence2 and score")


def _check_data(data: DataArguments, do_train: bool, do_eval: bool) -> None:
    if data.dataset_name and (data.train_file or data.validation_file):
        raise ConfigError("give dataset_name or files, not both")
    if do_train and not (data.dataset_name or data.train_file):
        raise ConfigError("do_train needs dataset_name or train_file")
    if do_eval and not (data.dataset_name or data.train_file or data.validation_file):
        raise ConfigError("do_eval needs dataset_name, train_file or validation_file")
    if not 0 < data.validation_split_percentage < 100:
        raise ConfigError(f"validation_split_percentage must be from 1 to 99; got {data.validation_split_percentage}")
    if data.max_seq_length is not None and data.max_seq_length < 2:
        raise ConfigError(
            f"max_seq_length must be at least 2, since no first token is predicted; got {data.max_seq_length}"
        )
    check_range("max_seq_length", data.max_seq_length, Range(2, LONGEST_SEQUENCE))
    check_counts(data, "max_train_samples", "max_eval_samples", "preprocessing_num_workers")
    check_range("preprocessing_num_workers", data.preprocessing_num_workers, WORKERS)
    if data.pad_to_max_length and data.padding_free:
        raise ConfigError("pad_to_max_length and padding_free contradict each other; give one of them")
