"""Settings that all training commands share, their checks, and how settings are read: one JSON file, flags, or both.

A flag wins over the file.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser

from ..errors import ConfigError
from ..model.sinks import Sinks
from . import Parser, one_line, underscored
from .output_folder import check_output_dir as check_output_dir
from .ranges import BELOW_ONE, COUNT, RANK, check_range, check_text, check_training_numbers
from .settings_by_release import has_accelerator, name_of_checkpointing, translate_settings
from .settings_help import ALL, NOTES, Formatter, shorten
from .sink_settings import check_sinks

# Of so few tokens in bfloat16 on a CPU, a forward and a backward of torch's SDPA take 1 to 4 times what eager attention does;
# of 512 tokens, 0.6 (`python -m benchmarks.cpu_attention`).
EAGER_UP_TO = 256


@dataclass
class CommonModelArguments:
    """The model, how it is loaded, and the adapter to train. The names and defaults are those of LLM2Vec's scripts."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of a causal model."})
    gguf_file: str | None = field(default=None, metadata={"help": "Load this GGUF file of the model's folder."})
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "The type of the weights."}
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": f"eager, sdpa, ... Default: sdpa; in bfloat16 on a CPU, up to {EAGER_UP_TO} tokens, eager."
        },
    )
    layers: int | None = field(
        default=None, metadata={"help": "Keep the first N layers alone."}
    )
    num_sink_tokens: int | None = field(
        default=None,
        metadata={"help": "The first N tokens of each text stay causal and aren't pooled. Default: as it was saved, else 0."},
    )
    num_sinkless_layers: int | None = field(
        default=None, metadata={"help": "In the last N layers no other token sees them. Default: as it was saved, else 0."}
    )
    sink_token: str | None = field(
        default=None,
        metadata={
            "help": "Put before each text: bos, eos or a token. Default with sink tokens: what the tokenizer puts there by "
            "itself, else bos, else eos; without: nothing more."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA; 0 trains all weights."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    preset: Literal["small"] | None = field(
        default=None,
        metadata={
            "help": "small: other defaults, for some 100M parameters and minutes of a CPU. "
            "See bidirect_patch/cli/README.md."
        },
    )


class _SettingsParser(HfArgumentParser, Parser):
    """transformers' parser of dataclasses, with flags and errors as this package's other parsers have them."""

    def __init__(self, kinds: Sequence[Any], command: str, about: str) -> None:
        words = {"usage": "%(prog)s [CONFIG.json] [--name value ...]", "description": about, "epilog": NOTES}
        HfArgumentParser.__init__(self, kinds, prog=f"bidirect-patch {command}", formatter_class=Formatter, **words)
        for action in self._actions:  # the help texts of transformers 5.2 hold a bare "%", and argparse formats by "%"
            if action.help:
                action.help = re.sub(r"%%|%(?!\()", "%%", action.help)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_settings(
    kinds: Sequence[Any],
    command: str,
    argv: list[str],
    replaces: Mapping[str, Sequence[str]] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Any]],
    about: str = "",
) -> tuple[tuple[Any, ...], str | None]:
    """Read `[CONFIG.json] [--name value ...]`.

    Args:
        kinds: The dataclasses that hold the settings. The last one is a subclass of TrainingArguments.
        command: The name of the command.
        argv: Its arguments.
        replaces: For the name of a flag, the settings of the file that it puts aside, besides its own.
        presets: For each name that `preset` can have, the settings that it stands for. A file or a flag wins over them.
        about: What the command does, and examples, for `--help`.

    Returns:
        An instance of each dataclass; and the `output_dir` that was given, which is None where TrainingArguments makes
        one up.

    Raises:
        ConfigError: A file or a setting cannot be used. The message names it.
    """
    parser = _SettingsParser(kinds, command, about)
    show_all = ALL in map(underscored, argv)
    if show_all or "-h" in argv or "--help" in argv:
        own = {f.name for kind in kinds[:-1] for f in fields(kind)} | set(kinds[-1].__annotations__)
        shorten(parser, own, show_all=show_all)
        parser.parse_args(["--help"])
    settings: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        settings = read_json(argv[0])
        argv = argv[1:]
    given = _read_flags(argv)
    aside = {name for flag in given for name in (replaces or {}).get(flag, ())}
    settings = {name: value for name, value in settings.items() if name not in aside} | given
    preset = settings.get("preset")
    if isinstance(preset, str):
        settings = {**_left_by(settings, presets.get(preset, {})), **settings}
    types = {f.name: f.type for kind in kinds for f in fields(kind) if f.init}
    settings = translate_settings(settings, set(types))
    _check_names(settings, types)
    values = _convert(parser, settings, kinds, types)
    check_training_numbers(values)
    _fit(values, given=set(settings))
    with transformers_errors():
        parsed = parser.parse_dict(values)
    for part in parsed:
        _check_dictionaries(part)
    return parsed, values["output_dir"]


def _fit(values: dict[str, Any], given: Set[str]) -> None:
    """Set what follows from the settings, of which some were given, and from the machine, in place."""
    on_cpu = values["use_cpu"] or values.get("no_cuda") or not has_accelerator()
    is_short = values["max_seq_length"] is not None and values["max_seq_length"] <= EAGER_UP_TO
    if on_cpu and is_short and (values["bf16"] or values["torch_dtype"] == "bfloat16") and "attn_implementation" not in given:
        values["attn_implementation"] = "eager"
    checkpointing = name_of_checkpointing(values)
    if values[checkpointing] and not values[f"{checkpointing}_kwargs"]:
        # The reentrant kind gives an adapter no gradient: the embeddings that enter the first layer are frozen.
        values[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    if has_accelerator():
        return
    values["dataloader_pin_memory"] = False  # torch would warn that it can't
    if values["bf16"] or values["bf16_full_eval"]:
        values["use_cpu"] = True  # transformers asks for it


def read_json(path: str) -> dict[str, Any]:
    """Read the settings in a JSON file. Those that are null are left out.

    Raises:
        ConfigError: There is no such file, or it does not hold one JSON object.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"no settings file {path!r}")
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deep") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold one JSON object of settings; it holds a {type(settings).__name__}")
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def transformers_errors() -> Iterator[None]:
    """Raise ConfigError for what transformers raises in the `with` block.

    It raises these classes for settings that contradict each other, and for packages that do not fit together.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        raise ConfigError(one_line(error)) from error


def check_given(name: str, value: str | None, what: str) -> None:
    """Raise ConfigError if a setting is missing; `what` says what it is."""
    if not value:
        raise ConfigError(f"{name} is missing: {what}")


def check_counts(settings: Any, *names: str) -> None:
    """Raise ConfigError if one of the named settings is given and no possible number of things."""
    for name in names:
        check_range(name, getattr(settings, name), COUNT)


def check_dropout(settings: Any, *names: str) -> None:
    """Raise ConfigError if one of the named settings is given and not in [0, 1)."""
    for name in names:
        check_range(name, getattr(settings, name), BELOW_ONE)


def check_model_settings(settings: CommonModelArguments) -> None:
    """Raise ConfigError if no model can have these layers and sink tokens, or no LoRA adapter these settings."""
    check_sinks(settings)
    if settings.sink_token == "":
        raise ConfigError("sink_token is empty: give bos, eos or a token of the vocabulary")
    check_dropout(settings, "lora_dropout")
    check_range("lora_r", settings.lora_r, RANK)


def _read_flags(argv: list[str]) -> dict[str, Any]:
    """Read `--name value`, `--name=value`, `--name` and `--no_name`. Several values of one flag make a list."""
    settings: dict[str, Any] = {}
    name = None
    needs_value = False
    for word in argv:
        if word.startswith("--"):
            name, given, value = underscored(word)[2:].partition("=")
            if name.startswith("no_") and name != "no_cuda" and not given:
                name, given, value = name[3:], "=", "False"
            settings[name] = value if given else "True"
            needs_value = not given
        elif name is None:
            raise ConfigError(f"expected a settings file ending in .json, or --name value; got {word!r}")
        elif needs_value:
            settings[name], needs_value = word, False
        else:
            earlier = settings[name] if isinstance(settings[name], list) else [settings[name]]
            settings[name] = [*earlier, word]
    return settings


def _left_by(settings: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """What of a preset has a meaning beside the settings: a causal model has no sinks, nor has one that is to have none."""
    has_no_sinks = str(settings.get("num_sink_tokens")) == "0" or str(settings.get("bidirectional")).lower() == "false"
    return {name: value for name, value in preset.items() if not (has_no_sinks and name in Sinks._fields)}


def _check_names(settings: dict[str, Any], types: dict[str, Any]) -> None:
    for name in settings:
        if name not in types:
            near = get_close_matches(name, types, 1)
            raise ConfigError(f"unknown key {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def _convert(
    parser: _SettingsParser, settings: dict[str, Any], kinds: Sequence[Any], types: dict[str, Any]
) -> dict[str, Any]:
    """Convert settings to the types of their fields, and add the defaults of the others.

    A value that a flag can express is parsed as a flag. So a value from a file is checked and converted in the same way.
    """
    for name, value in settings.items():
        check_text(name, value)
    structured = {name: value for name, value in settings.items() if isinstance(value, (dict, list))}
    ours = {f.name for kind in kinds[:-1] for f in fields(kind)}
    flags = [f"--{name}={value}" for name, value in settings.items() if name not in structured and value is not None]
    for name, value in list(structured.items()):
        kind = str(types[name]).lower()
        if "list" in kind and name in ours:
            of_numbers = re.search("int|float", kind)
            if not isinstance(value, list) or not (of_numbers or all(isinstance(part, str) for part in value)):
                raise ConfigError(f"{name} takes one value or a list of them; got {value!r}")
            if of_numbers:
                flags += [f"--{name}", *map(str, structured.pop(name))]
        elif name in ours or (re.search("int|float|bool", kind) and not re.search("dict|list", kind)):
            raise ConfigError(f"{name} is one value; got {value!r}")
    return vars(parser.parse_args(flags)) | structured


def _check_dictionaries(part: Any) -> None:
    for f in fields(part):
        value = getattr(part, f.name, None)
        if f.name.endswith("_kwargs") and not isinstance(value, (dict, type(None))):
            raise ConfigError(f"{f.name} takes a dictionary; got {value!r}")
