"""The encoder that is evaluated: found by what its folder says, and how its instructions are written."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from ... import load_llm2vec
from ...attention.versions import DTYPE_ARGUMENT
from ...checkpoints.marks import read_json as read_json_of
from ...checkpoints.marks import sinks_on_disk
from ...errors import ConfigError
from ...model.sinks import NO_SINKS
from ..common_settings import read_json
from ..simcse.instructions import as_prompt
from ..simcse.model import load_encoder
from ..simcse.saved_encoder import open_encoder
from ..simcse.settings import EncoderArguments


class Encoder(NamedTuple):
    """An encoder.

    Attributes:
        model: The SentenceTransformer.
        name: What it is called in the results.
        uses_instructions: Whether it was trained with instructions.
        write: Writes an instruction as the prompt that stands before a text.
        sources: The folders, files and hub names that it was made from.
    """

    model: Any
    name: str
    uses_instructions: bool
    write: Callable[[str], str]
    sources: tuple[str, ...] = ()


def load(flags: Any) -> Encoder:
    """Load the encoder that the flags name.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such encoder, or what is there is not enough for one.
    """
    name, adapter = flags.model, flags.peft_model_name_or_path
    called = os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
    if name.endswith(".json"):
        if adapter:
            raise ConfigError("peft_model_name_or_path is of LLM2Vec: give it in the settings file")
        folder = os.path.basename(os.path.dirname(os.path.abspath(name)))
        model, sources = _from_settings(name, flags)
        return Encoder(model, folder or called, False, as_prompt, sources)
    is_llm2vec = bool(read_json_of(name, "llm2vec_config.json", {}))
    options = {DTYPE_ARGUMENT: flags.torch_dtype, "attn_implementation": flags.attn_implementation}
    if read_json_of(name, "config_sentence_transformers.json", {}):
        if adapter:
            raise ConfigError(f"{name} is a whole encoder already: give no peft_model_name_or_path")
        model = open_encoder(name, **options)
        uses = is_llm2vec or any(model.prompts.values())
        return Encoder(model, called, uses, _llm2vec if is_llm2vec else as_prompt, (name,))
    is_adapter = bool(read_json_of(name, "adapter_config.json", {}))
    if not (adapter or is_adapter or is_llm2vec):
        raise ConfigError(
            f"{name} is neither an encoder of sentence-transformers nor one of LLM2Vec. Of a model as it is, `bidirect-patch "
            "sweep` makes one: give its output_dir, or its settings.json"
        )
    for each in filter(None, (name, adapter)):
        if sinks_on_disk(each) != NO_SINKS:
            raise ConfigError(
                f"{each} was trained with sink tokens, which LLM2Vec lacks: give it to simcse, and its result here"
            )
    loaded = load_llm2vec(name, adapter, **options)
    called = os.path.basename(os.path.abspath(adapter)) if adapter and os.path.exists(adapter) else adapter or called
    return Encoder(loaded, called, True, _llm2vec, tuple(filter(None, (name, adapter))))


def _from_settings(path: str, flags: Any) -> tuple[Any, tuple[str, ...]]:
    """The encoder that a sweep has chosen, from its settings, and what it is made from."""
    settings = read_json(path)
    known = {f.name for f in fields(EncoderArguments)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]!r} is no setting of an encoder")
    own = {"torch_dtype": flags.torch_dtype, "attn_implementation": flags.attn_implementation}
    model, limit = load_encoder(EncoderArguments(**own | settings | {"simcse_dropout": 0.0, "lora_r": 0}), {})
    model[0].max_seq_length = limit
    named = (settings.get(name) for name in ("model_name_or_path", "peft_model_name_or_path"))
    return model, (path, *filter(None, named))


def _llm2vec(instruction: str) -> str:
    """As LLM2Vec writes an instruction in MTEB: with a colon at its end."""
    return instruction if instruction.endswith(":") or not instruction else f"{instruction.strip('.')}:"
