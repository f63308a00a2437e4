"""Saving with every adapter merged, so that the folder holds a whole model.

A folder that holds an adapter alone has no config.json, and nothing in it makes another process bidirectional. The config.json of
a whole model says `is_causal: false`.
"""

import copy
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ArgumentError, UnsupportedModelError
from ..swap.view import view


def save_merged(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a model with its adapters merged, in the form that opens without them and without PEFT.

    The active adapters are merged into a copy, which is saved. The model itself keeps its adapters. While the call runs,
    the model that holds adapters is in memory twice.

    Args:
        model: a SentenceTransformer, a transformers model, or a PEFT model. Its adapters may have been put on by `add_adapter` or
            `load_adapter` of any of these, or by `get_peft_model`. A model without adapters is saved as it is.
        folder: where to write it.
        **kwargs: passed on to the model's own `save_pretrained`.

    Raises:
        ArgumentError: `model` has no `save_pretrained`, or `folder` is no path or is an existing file.
        UnsupportedModelError: an adapter that can't be merged, such as a prompt.

    Example:
        >>> import tempfile, peft, transformers
        >>> from bidirect_patch import enable_bidirectional, save_merged
        >>> sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = enable_bidirectional(transformers.LlamaModel(transformers.LlamaConfig(**sizes)))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(model, folder)
        ...     transformers.AutoConfig.from_pretrained(folder).is_causal
        False
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "save_pretrained"):
        raise ArgumentError(
            f"save_merged takes a SentenceTransformer, a transformers model or a PEFT model, got {type(model).__name__}"
        )
    if not isinstance(folder, (str, os.PathLike)) or os.path.isfile(folder):
        raise ArgumentError(f"save_merged writes to a folder, got {folder!r}")
    with_adapters_merged(model).save_pretrained(os.fspath(folder), **kwargs)


def with_adapters_merged(module: nn.Module) -> Any:
    """`module`, or where there are adapters in it a module like it without them, which gives the same outputs.

    Raises:
        UnsupportedModelError: an adapter that can't be merged.
    """
    if getattr(module, "peft_config", None):
        return _merged(module)
    inner = {name: with_adapters_merged(child) for name, child in module._modules.items() if child is not None}
    changed = {name: child for name, child in inner.items() if child is not module._modules[name]}
    return view(module, modules=changed) if changed else module


def _merged(model: Any) -> Any:
    try:
        copied = copy.deepcopy(model)
        if not isinstance(model, PreTrainedModel):
            return copied.merge_and_unload()
        _merge_layers(copied)
        del copied.peft_config
        copied._hf_peft_config_loaded = False
        return copied
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kinds = sorted({str(getattr(c, "peft_type", type(c).__name__)) for c in model.peft_config.values()})
        raise UnsupportedModelError(
            f"the adapters of this {type(model).__name__} ({', '.join(kinds)}) can't be merged: {error}. Save them alone, by "
            "save_pretrained, and open the folder after `import bidirect_patch.auto`"
        ) from error


def _merge_layers(parent: nn.Module) -> None:
    """Merge adapters that transformers put into a model, in place. PEFT's `merge_and_unload` is only of its own wrapper."""
    for name, layer in list(parent.named_children()):
        whole = _without_adapter(layer)
        if whole is layer:
            _merge_layers(layer)
        else:
            setattr(parent, name, whole)


def _without_adapter(layer: Any) -> Any:
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if hasattr(layer, "modules_to_save"):  # PEFT before 0.16 has no such method on a layer that it trains as a whole
        return _without_adapter(layer.modules_to_save[layer.active_adapter])
    if hasattr(layer, "base_layer"):
        layer.merge()
        return layer.get_base_layer()
    return layer
