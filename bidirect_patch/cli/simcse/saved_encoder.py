"""Finished encoders, as folders of sentence-transformers: opened, and what one says of its pooling."""

import json
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import load_file_path
from transformers import AutoTokenizer

from ...checkpoints.guard import opening_sinks
from ...checkpoints.marks import is_marked, sinks_on_disk
from ...errors import ConfigError
from ...patch import enable_bidirectional
from ..added_token import adds
from ..load_errors import loading
from .settings import PoolingMode

# The name of a pooling mode in LLM2Vec -> its name in sentence-transformers.
POOLING: dict[PoolingMode, str] = {"mean": "mean", "weighted_mean": "weightedmean", "eos_token": "lasttoken"}

# Classes of modules of which the settings of `simcse` say the same. The last one changes no cosine.
_KNOWN = ("Transformer", "WithoutSinks", "Pooling", "Normalize")


def open_encoder(name: str, what: str = "", **options: Any) -> Any:
    """An encoder of sentence-transformers, bidirectional if it was saved so, with the sinks that it was saved with.

    Args:
        name: Its folder or hub name.
        what: What an error calls it; its name by default.
        **options: Arguments of the transformers model's `from_pretrained`.

    Raises:
        ConfigError: There is no such encoder.
    """
    with loading(what or name), opening_sinks():
        model = SentenceTransformer(name, model_kwargs=options)
    if is_marked(name):
        enable_bidirectional(model, **sinks_on_disk(name)._asdict())
    return model


def choose_pooling(asked: PoolingMode | None, name: str) -> PoolingMode:
    """The pooling of the settings, else that of the encoder which is trained further, else the mean.

    Args:
        asked: What the settings say.
        name: The folder or hub name of the model or encoder.

    Raises:
        ConfigError: It is an encoder with a module that would be lost, or with a pooling that has no setting.
    """
    modules = _modules_of(name)
    if not modules:
        return asked or "mean"
    sinks = sinks_on_disk(name).num_sink_tokens
    lost = [kind for kind, _ in modules if kind not in _KNOWN]
    left_out = [_config_of(name, path).get("num_sink_tokens") for kind, path in modules if kind == "WithoutSinks"]
    lost += [f"WithoutSinks({number})" for number in left_out if number != sinks]
    if lost:
        raise ConfigError(
            f"{name} is an encoder with {', '.join(lost)}, which would be lost here, so that it would be another one: give the "
            "model that it was made from"
        )
    if asked:
        return asked
    saved = [_saved_mode(name, path) for kind, path in modules if kind == "Pooling"]
    own = next((ours for ours, theirs in POOLING.items() if saved == [theirs]), None)
    if own == "eos_token" and not _ends_texts(name):
        own = None
    if own is None:
        theirs = ", ".join(map(str, filter(None, saved))) or "nothing"
        raise ConfigError(
            f"{name} is an encoder that pools by {theirs}, as no pooling_mode does here: give one of {', '.join(POOLING)}"
        )
    return own


def _modules_of(name: str) -> list[tuple[str, str]]:
    """The class and the folder of each module of an encoder; none of a model that is no encoder."""
    entries = _json(name, "", "modules.json")
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"modules.json of {name} is no list of modules")
    return [(str(entry.get("type")).rpartition(".")[2], str(entry.get("path", ""))) for entry in entries]


def _saved_mode(name: str, path: str) -> Any:
    """How a Pooling was saved, in sentence-transformers' words; "" if that can't be told."""
    config = _config_of(name, path)
    old = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    # An older release has a key for each mode, such as pooling_mode_mean_tokens.
    return config.get("pooling_mode") or ", ".join(key[len("pooling_mode_") :].removesuffix("_tokens") for key in old)


def _ends_texts(name: str) -> bool:
    """Whether the tokenizer of an encoder puts its end token after each text."""
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer.eos_token is not None and adds(tokenizer, tokenizer.eos_token, "last")


def _config_of(name: str, path: str) -> dict[str, Any]:
    config: dict[str, Any] = _json(name, path, "config.json") or {}
    return config


def _json(name: str, folder: str, file: str) -> Any:
    """A JSON file of an encoder; None where there is none."""
    with loading(name):
        path = load_file_path(name, file, subfolder=folder)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
