"""What a checkpoint or adapter on disk says: whether it belongs to bidirectional attention."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..model.config import parts
from ..model.find import holds_decoder
from ..model.sinks import NO_SINKS, Sinks, read_sinks

HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder")
# The classes that LLM2Vec's adapters and full models name, and no flag. A miss: what LLM2Vec wrote opens causal. A wrong match:
# a warning, or with bidirect_patch.auto a bidirectional model, of a class that has such a name.
_LLM2VEC_CLASS = re.compile(
    r"Bi(Model|ForMNTP)$|^(Llama|Mistral|Gemma|Qwen2)EncoderModel$|llm2vec|LLM2Vec|modeling_\w+_encoder"
)


def is_marked(name_or_path: Any, **hub: Any) -> bool:
    """Whether a checkpoint or adapter says `is_causal: false` in its config, or names one of LLM2Vec's bidirectional classes.

    Args:
        name_or_path: folder or hub name. Without a config, the answer is False.
        hub: revision, cache_dir, token, subfolder, local_files_only, as `from_pretrained` takes them.
    """
    hub = {name: value for name, value in hub.items() if name in (*HUB_OPTIONS, "local_files_only")}
    return any(
        _config_says_so(read_json(name_or_path, file_name, hub)) for file_name in ("adapter_config.json", "config.json")
    )


def was_marked(model: Any) -> bool:
    """Whether the config that a model was loaded with says so, and the model holds a decoder of which that can be true."""
    says_so = any(getattr(part, "is_causal", True) is False for part in parts(model.config))
    says_so = says_so or any(map(_LLM2VEC_CLASS.search, getattr(model.config, "architectures", None) or ()))
    return says_so and holds_decoder(model)


def sinks_in_config(config: Any) -> Sinks | None:
    """The sinks that one config, an object or a dict, says by itself; None if it says nothing of sinks."""
    fields = config if isinstance(config, dict) else vars(config)
    numbers = [fields.get(name) or 0 for name in Sinks._fields]
    return read_sinks(*numbers) if any(numbers) else None


def saved_sinks(config_or_model: Any) -> Sinks:
    """The sinks with which a model was saved, from its config; none if it had none.

    Raises:
        ArgumentError: the config says numbers that have no meaning.
    """
    config = getattr(config_or_model, "config", config_or_model)
    return _first_sinks(parts(config))


def sinks_on_disk(name_or_path: Any, **hub: Any) -> Sinks:
    """The sinks of which a checkpoint or adapter on disk says that it was trained with; see `is_marked`."""
    hub = {name: value for name, value in hub.items() if name in (*HUB_OPTIONS, "local_files_only")}
    files = (read_json(name_or_path, file_name, hub) for file_name in ("adapter_config.json", "config.json"))
    return _first_sinks(part for config in files for part in _parts_of_json(config))


def marked_sinks(config: dict[str, Any]) -> Sinks | None:
    """The sinks that a config as a dict belongs to, if it belongs to bidirectional attention; None if not."""
    if not _config_says_so(config):
        return None
    return _first_sinks(_parts_of_json(config))


def _first_sinks(configs: Iterable[Any]) -> Sinks:
    """The sinks of the first config that says some; none if none does."""
    return next(filter(None, map(sinks_in_config, configs)), NO_SINKS)


def _config_says_so(config: dict[str, Any]) -> bool:
    classes = [str(v) for key in ("auto_mapping", "auto_map") for v in (config.get(key) or {}).values()]
    classes += map(str, config.get("architectures") or ())
    return any(part.get("is_causal") is False for part in _parts_of_json(config)) or any(map(_LLM2VEC_CLASS.search, classes))


def _parts_of_json(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and the configs in it, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts_of_json(value)


def read_json(name_or_path: Any, file_name: str, hub: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a folder or hub name, as a dict; empty where there is none that can be read."""
    from transformers.utils import cached_file

    try:
        path = cached_file(os.fspath(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return {}
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
            return config if isinstance(config, dict) else {}
    except (OSError, ValueError, TypeError):
        return {}
