"""Settings of the training command, from one JSON file, from flags, or from both (a flag wins).

The names and defaults are those of LLM2Vec's run_mntp.py and of transformers' TrainingArguments.
"""

import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

from transformers import HfArgumentParser, TrainingArguments

from ..errors import ConfigError
from . import one_line
from .eras import to_this_era


@dataclass
class ModelArguments:
    """Which model and tokenizer, how to load them, and the adapter to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of a causal model."})
    gguf_file: str | None = field(default=None, metadata={"help": "Load this GGUF file of the model's folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "If it isn't the model's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data sets."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the tokenizers library."})
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "The type that the weights are loaded in."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2 or another name that transformers knows."}
    )
    low_cpu_mem_usage: bool = field(default=False, metadata={"help": "Load without a second copy of the weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter; 0 trains all weights instead."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})


@dataclass
class DataArguments:
    """Which texts, and how they become sequences."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub, or a folder of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Text (.txt), JSON lines (.json, .jsonl) or .csv."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training texts to evaluate on if there are none for that."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens a sequence; default the tokenizer's limit, at most 1024."}
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line is a sequence of its own, instead of chunks of one long text."}
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the longest."})
    padding_free: bool = field(default=False, metadata={"help": "Pack each batch into one row without padding."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many sequences at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many at most."})
    streaming: bool = field(default=False, metadata={"help": "Read the texts as training goes."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if it was done before."})


@dataclass
class MNTPArguments:
    """Masking, and when to stop."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict, in (0, 1]."})
    mask_token_type: Literal["blank", "eos", "mask"] = field(
        default="blank",
        metadata={"help": "What hides a token if the tokenizer has no mask token: _, its end token, or <mask>."},
    )
    mask_token: str | None = field(default=None, metadata={"help": "Hide tokens with this one instead."})
    data_collator_type: Literal["default", "all_mask"] = field(
        default="default", metadata={"help": "Mask, random token or unchanged 80/10/10; or always the mask."}
    )
    stop_after_n_steps: int = field(default=10000, metadata={"help": "Stop here, wherever the schedule is."})
    eval_baselines: bool = field(
        default=True,
        metadata={"help": "With do_eval, evaluate both models before the first step (not under FSDP or DeepSpeed)."},
    )


@dataclass
class MNTPTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with what the newest no longer have."""

    output_dir: str | None = field(default=None, metadata={"help": "Where checkpoints and the result are written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew though output_dir holds something, instead of resuming from it."}
    )


KINDS = (ModelArguments, DataArguments, MNTPArguments, MNTPTrainingArguments)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, MNTPArguments, MNTPTrainingArguments]:
    """`[CONFIG.json] [--name value ...]` -> the settings by kind, checked.

    Raises:
        ConfigError: a file or setting that can't be used; the message names it.
    """
    (model, data, mntp, training), output_dir = parse_kinds(KINDS, "mntp", argv)
    _check(model, data, mntp, training, output_dir)
    return model, data, mntp, training


def parse_kinds(kinds: Any, command: str, argv: list[str]) -> tuple[tuple, str | None]:
    """The settings of a command as dataclasses of `kinds`, and the output_dir that was given (transformers makes one up).

    Raises:
        ConfigError: a file or setting that can't be used; the message names it.
    """
    parser = _Parser(kinds, prog=f"bidirect-patch {command}", usage="%(prog)s [CONFIG.json] [--name value ...]")
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    settings = {}
    if argv and not argv[0].startswith("-"):
        settings = read_json(argv[0])
        argv = argv[1:]
    settings |= _read_flags(argv)
    known = {f.name: f.type for kind in kinds for f in fields(kind) if f.init}
    settings = to_this_era(settings, set(known))
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ConfigError(f"unknown key {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    # What a flag could say takes a flag's way, so that a file's values are checked and converted just the same.
    structured = {name: value for name, value in settings.items() if isinstance(value, (dict, list))}
    ours = {f.name for kind in kinds[:-1] for f in fields(kind)}
    for name, value in structured.items():
        kind = str(known[name]).lower()
        if name in ours or (re.search("int|float|bool", kind) and not re.search("dict|list", kind)):
            raise ConfigError(f"{name} is one value; got {value!r}")
    flags = [f"--{name}={value}" for name, value in settings.items() if name not in structured and value is not None]
    values = vars(parser.parse_args(flags)) | structured
    if values["gradient_checkpointing"] and not values["gradient_checkpointing_kwargs"]:
        # The reentrant kind gives an adapter no gradient: the embeddings that enter the first layer are frozen.
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    _check_numbers(values)
    try:
        parsed = parser.parse_dict(values)
        for name in known:
            value = next(getattr(part, name) for part in parsed if hasattr(part, name))
            if name.endswith("_kwargs") and not isinstance(value, (dict, type(None))):
                raise ConfigError(f"{name} takes a dictionary; got {value!r}")
        return parsed, values["output_dir"]
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        raise ConfigError(one_line(error)) from error


def read_json(path: str) -> dict[str, Any]:
    """The settings in a JSON file, those that are null left out."""
    if not os.path.isfile(path):
        raise ConfigError(f"no settings file {path!r}")
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold one JSON object of settings; it holds a {type(settings).__name__}")
    return {name: value for name, value in settings.items() if value is not None}


def _check_numbers(values: dict[str, Any]) -> None:
    """The training arguments that transformers takes as they are, to fail later or to train nothing."""
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in counts:
        if values[name] < 1:
            raise ConfigError(f"{name} must be at least 1; got {values[name]}")
    for name in ("learning_rate", "weight_decay", "seed"):
        if not 0 <= values[name] < math.inf:
            raise ConfigError(f"{name} must be 0 or more; got {values[name]}")
    if not 0 < values["num_train_epochs"] < math.inf and values["max_steps"] <= 0:
        raise ConfigError(f"num_train_epochs must be above 0; got {values['num_train_epochs']}")


class _Parser(HfArgumentParser):
    def error(self, message: str):  # argparse would print pages of usage first
        raise ConfigError(message)


def _read_flags(argv: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` and `--no_name` as a dictionary; several values make a list."""
    settings: dict[str, Any] = {}
    name = None
    for word in argv:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name.startswith("no_") and name != "no_cuda" and not given:
                name, value, given = name[3:], "False", "="
            settings[name] = value if given else "True"
            waiting = not given
        elif name is None:
            raise ConfigError(f"expected a settings file ending in .json, or --name value; got {word!r}")
        elif waiting:
            settings[name], waiting = word, False
        else:
            earlier = settings[name] if isinstance(settings[name], list) else [settings[name]]
            settings[name] = [*earlier, word]
    return settings


def _check(
    model: ModelArguments,
    data: DataArguments,
    mntp: MNTPArguments,
    training: MNTPTrainingArguments,
    output_dir: str | None,
) -> None:
    if not (training.do_train or training.do_eval):
        raise ConfigError("nothing to do: give do_train, do_eval or both")
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: a folder or hub name of a causal model")
    if not output_dir:
        raise ConfigError("output_dir is missing: a folder for checkpoints and the result")
    if data.dataset_name and (data.train_file or data.validation_file):
        raise ConfigError("give dataset_name or files, not both")
    if training.do_train and not (data.dataset_name or data.train_file):
        raise ConfigError("do_train needs dataset_name or train_file")
    if training.do_eval and not (data.dataset_name or data.train_file or data.validation_file):
        raise ConfigError("do_eval needs dataset_name, train_file or validation_file")
    if not 0 < mntp.mlm_probability <= 1:
        raise ConfigError(f"mlm_probability must be in (0, 1]; got {mntp.mlm_probability}")
    if not 0 < data.validation_split_percentage < 100:
        raise ConfigError(f"validation_split_percentage must be from 1 to 99; got {data.validation_split_percentage}")
    if not 0 <= model.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be in [0, 1); got {model.lora_dropout}")
    if model.lora_r < 0:
        raise ConfigError(f"lora_r must be 0 or more; got {model.lora_r}")
    if data.max_seq_length is not None and data.max_seq_length < 2:
        raise ConfigError(f"max_seq_length must be at least 2, since no first token is predicted; got {data.max_seq_length}")
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ConfigError(f"output_dir {output_dir} is a file: give a folder")
    counts: dict[str, int | None] = {"stop_after_n_steps": mntp.stop_after_n_steps}
    counts |= {"max_train_samples": data.max_train_samples, "max_eval_samples": data.max_eval_samples}
    counts |= {"preprocessing_num_workers": data.preprocessing_num_workers}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    if data.pad_to_max_length and data.padding_free:
        raise ConfigError("pad_to_max_length and padding_free contradict each other; give one of them")
