"""What a bidirectional model leaves on disk: `"is_causal": false` in config.json, under the stock architecture name.

Stock transformers from 5.2 on heeds that flag, and so do others that read it (vLLM). An adapter has no config.json (with
one beside it, transformers takes the folder for a whole model), so its adapter_config.json gets the flag, where PEFT
keeps what it knows of the base model: `"auto_mapping": {"is_causal": false}`.
Nothing on the live model or its config object changes.
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..swap import swap
from ..model.find import decoders
from ..attention.forward import BidirectionalModel


def holds_bidirectional(model: nn.Module) -> bool:
    """Whether a decoder in `model` is bidirectional now."""
    return any(swap.is_swapped(m, BidirectionalModel) for m in model.modules())


def saving_config(model: Any) -> Any:
    """A copy of `model.config` that says `is_causal: false` for each bidirectional decoder in `model`, if it is wholly so."""
    config = copy.deepcopy(model.config)
    partial = [d.module for d in decoders(model) if d.in_the_way]
    for module in model.modules():
        if swap.is_swapped(module, BidirectionalModel) and not any(module is p for p in partial):
            inner = vars(model.config).items()  # of a composite config; older transformers give its models a copy
            parts = [n for n, value in inner if value is module.config]
            parts = parts or [n for n, value in inner if type(value) is type(module.config)]
            for part in [getattr(config, n) for n in parts] or [config]:
                part.is_causal = False
    return config


@contextmanager
def _saved_as(model: Any, config: Any) -> Iterator[None]:
    """`model` with the config to be saved, and without a GGUF's marks on weights that are plain numbers by now."""
    attributes: dict[str, Any] = {"config": config}
    quantization = getattr(config, "quantization_config", None)
    if "gguf" in str(getattr(quantization, "quant_method", quantization)).lower() and _plain(model):
        del config.quantization_config
        attributes |= {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}
    before = {name: model.__dict__[name] for name in attributes if name in model.__dict__}
    model.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                model.__dict__[name] = before[name]
            else:
                del model.__dict__[name]


def _plain(model: nn.Module) -> bool:
    return all(p.is_floating_point() for p in model.parameters())


def save_model(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained` of a bidirectional model."""
    adapters = getattr(model, "peft_config", {})  # where transformers put some on, it writes them and nothing else
    with _saved_as(model, saving_config(model)), marked(adapters.values()):
        return wrapped(*args, **kwargs)


def save_causal(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """`save_pretrained` of a model that is causal though its config says it isn't: the flag is left out."""
    config = copy.deepcopy(model.config)
    del config.is_causal
    with _saved_as(model, config):
        return wrapped(*args, **kwargs)


_MARK = "_bidirect_patch_bidirectional"  # on the PEFT config of an adapter that belongs to bidirectional attention


def mark(adapter: Any) -> None:
    """Have every file that this PEFT config is saved to say `is_causal: false`."""
    setattr(adapter, _MARK, True)


@contextmanager
def marked(adapters: Iterable[Any]) -> Iterator[None]:
    """Have what is saved within say so."""
    new = [adapter for adapter in adapters if not hasattr(adapter, _MARK)]
    for adapter in new:
        mark(adapter)
    try:
        yield
    finally:
        for adapter in new:
            delattr(adapter, _MARK)


def save_adapter_config(wrapped: Any, adapter: Any, args: Any, kwargs: Any) -> Any:
    """`PeftConfigMixin.save_pretrained`, which every way to save an adapter comes to before anything is uploaded."""
    if hasattr(adapter, _MARK):
        known = kwargs.get("auto_mapping_dict") or getattr(adapter, "auto_mapping", None) or {}
        kwargs = {**kwargs, "auto_mapping_dict": {**known, "is_causal": False}}
    return wrapped(*args, **kwargs)


# The classes that adapters of LLM2Vec, which carry no flag, say they were trained on.
_BIDIRECTIONAL_CLASS = re.compile(
    r"Bi(Model|ForMNTP)$|^(Llama|Mistral|Gemma|Qwen2)EncoderModel$|llm2vec|LLM2Vec|modeling_\w+_encoder"
)


def says_bidirectional(name_or_path: Any, **hub: Any) -> bool:
    """Whether a checkpoint or adapter says `is_causal: false` in its config, or names one of LLM2Vec's bidirectional
    classes.

    hub: revision, cache_dir, token, subfolder, as `from_pretrained` takes them. False where it has no config.
    """
    hub = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token", "subfolder", "local_files_only")}
    for file_name in ("adapter_config.json", "config.json"):
        config = _read(name_or_path, file_name, hub)
        parts = [config, *(value for value in config.values() if isinstance(value, dict))]
        classes = [str(v) for key in ("auto_mapping", "auto_map") for v in (config.get(key) or {}).values()]
        if any(part.get("is_causal") is False for part in parts) or any(map(_BIDIRECTIONAL_CLASS.search, classes)):
            return True
    return False


def _read(name_or_path: Any, file_name: str, hub: dict[str, Any]) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        path = cached_file(os.fspath(name_or_path), file_name, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return {}
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, TypeError):
        return {}


def fit_adapter_keys(model: Any, where: Any, name: str, **hub: Any) -> Any:
    """Load an adapter's weights again if they didn't arrive, under the names that they have here; what PEFT says of that.

    LLM2Vec's are for a bare `LlamaModel` (`base_model.model.layers...`); a `*ForCausalLM` has one `model.` more.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    prefix = "base_model.model."
    now = get_peft_model_state_dict(model, adapter_name=name)
    here = {key.removeprefix(prefix): key for key in now}
    given = load_peft_weights(os.fspath(where), device="cpu", **hub)
    fitted = {}
    for key, weight in given.items():
        bare = key.removeprefix(prefix)
        alike = (k for k in here if k == bare or k.endswith(f".{bare}") or bare.endswith(f".{k}"))
        fitted[here.get(next(alike, ""), key)] = weight
    if all(key in now and torch.equal(now[key].cpu(), weight.to(now[key].dtype)) for key, weight in fitted.items()):
        return None
    how = {"low_cpu_mem_usage": True} if any(p.is_meta for p in model.parameters()) else {}
    return set_peft_model_state_dict(model, fitted, adapter_name=name, **how)
