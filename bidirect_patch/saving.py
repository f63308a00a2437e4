"""What a bidirectional model leaves on disk: `"is_causal": false` in config.json, under the stock architecture name.

Stock transformers from 5.2 on heeds that flag, and so do others that read it (vLLM). An adapter folder gets a
config.json with the flag beside its adapter_config.json: the mark that the adapter was trained bidirectionally.
Nothing on the live model or its config object changes.
"""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import swap
from .forward import BidirectionalModel


def holds_bidirectional(model: nn.Module) -> bool:
    """Whether a decoder in `model` is bidirectional now."""
    return any(swap.is_swapped(m, BidirectionalModel) for m in model.modules())


def saving_config(model: Any) -> Any:
    """A copy of `model.config` that says `is_causal: false` for each bidirectional decoder in `model`."""
    config = copy.deepcopy(model.config)
    for module in model.modules():
        if swap.is_swapped(module, BidirectionalModel):
            parts = [n for n, value in vars(model.config).items() if value is module.config]
            for part in [getattr(config, n) for n in parts] or [config]:
                part.is_causal = False
    return config


@contextmanager
def _saved_as(model: Any) -> Iterator[None]:
    """`model` with the config to be saved, and without a GGUF's marks on weights that are plain numbers by now."""
    config = saving_config(model)
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
    """Stands around `PreTrainedModel.save_pretrained`."""
    if not holds_bidirectional(model):
        return wrapped(*args, **kwargs)
    with _saved_as(model):
        return wrapped(*args, **kwargs)


def save_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """Stands around `PeftModel.save_pretrained`: marks each adapter folder that it wrote."""
    result = wrapped(*args, **kwargs)
    if holds_bidirectional(model) and kwargs.get("is_main_process", True):
        folder = os.fspath(args[0] if args else kwargs["save_directory"])
        folders = [folder, *(os.path.join(folder, name) for name in model.peft_config)]
        config = saving_config(model.get_base_model())
        for place in folders:
            if os.path.isfile(os.path.join(place, "adapter_config.json")):
                config.save_pretrained(place)
    return result


def says_bidirectional(name_or_path: Any, **hub: Any) -> bool:
    """Whether the config.json of a checkpoint or adapter says `is_causal: false`, at its top or for its text part.

    hub: revision, cache_dir, token, subfolder, as `from_pretrained` takes them. False where there is no config.json.
    """
    from transformers.utils import cached_file

    hub = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token", "subfolder", "local_files_only")}
    try:
        path = cached_file(os.fspath(name_or_path), "config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return False
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, TypeError):
        return False
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(part.get("is_causal") is False for part in parts)
