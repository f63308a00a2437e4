"""The settings of an LLM2Vec encoder: its llm2vec_config.json, and what is given in its place."""

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError, one_line

FILE_NAME = "llm2vec_config.json"
POOLING_MODES = ("mean", "weighted_mean", "eos_token", "last_token", "bos_token")
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class EncoderSettings:
    """The keys of llm2vec_config.json with LLM2Vec's defaults, and one key more.

    Args:
        pooling_mode: one of POOLING_MODES.
        max_length: tokens of an instruction and its text together, special tokens included; what is beyond is cut.
        doc_max_length: tokens of a text alone; longer texts lose words at their end.
        skip_instruction: whether only the text's own tokens are pooled.
        model_name: a model that LLM2Vec wraps in a chat format of its own, or "". LLM2Vec's files have no such key: it reads the
            name from config.json, where newer releases of transformers no longer write it.
    """

    pooling_mode: str = "mean"
    max_length: int = 512
    doc_max_length: int = 400
    skip_instruction: bool = True
    model_name: str = ""

    def to_file(self) -> dict[str, Any]:
        """What is written to llm2vec_config.json. LLM2Vec reads it too, unless there is a model_name."""
        return {name: value for name, value in asdict(self).items() if name != "model_name" or value}


def read_settings(folder: str, given: dict[str, Any]) -> EncoderSettings:
    """The settings of a folder: what is given, else what its llm2vec_config.json says, else LLM2Vec's defaults.

    As in LLM2Vec, the file of a hub name is not looked for.

    Raises:
        ConfigError: A setting has no meaning, or the file can't be read.
    """
    check_settings(given, "")
    path = os.path.join(folder, FILE_NAME)
    written: Any = {}
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                written = json.load(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read {path}: {one_line(error)}") from error
        if not isinstance(written, dict):
            raise ConfigError(f"{path} must hold an object of settings; got {type(written).__name__}")
        check_settings(written, f" in {path}")
    return EncoderSettings(**{**written, **given})


def check_settings(settings: dict[str, Any], where: str) -> None:
    """Check settings by name.

    Args:
        settings: Some or all of the fields of EncoderSettings.
        where: Where they stand, for the message: " in FILE", or "".

    Raises:
        ConfigError: A name is unknown, or its value has no meaning.
    """
    known = [field.name for field in fields(EncoderSettings)]
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{name!r}{where} is no setting of LLM2Vec; there are {', '.join(known)}")
        if name == "pooling_mode" and value not in POOLING_MODES:
            raise ConfigError(f"pooling_mode{where} must be one of {', '.join(POOLING_MODES)}; got {value!r}")
        if name in ("max_length", "doc_max_length"):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST_TOKENS:
                raise ConfigError(f"{name}{where} must be a number of tokens, 1 or more; got {value!r}")
        if name == "skip_instruction" and not isinstance(value, bool):
            raise ConfigError(f"skip_instruction{where} must be True or False; got {value!r}")
        if name == "model_name" and not isinstance(value, str):
            raise ConfigError(f"model_name{where} must be a name; got {value!r}")
