"""Saving: `"is_causal": false` in config.json, under the stock architecture name.

Stock transformers from 5.2 on reads that flag, and so do others (vLLM). Sink tokens stand beside it, which none of them knows:
see `guard`. Nothing on the live model or its config changes: a shallow copy is saved.
"""

import copy
from typing import Any

from torch import nn

from ..attention.model_forward import BidirectionalModel
from ..model.config import parts
from ..model.find import decoders
from ..model.sinks import NO_SINKS, Sinks, sinks_of
from ..swap.classes import has_mixin
from ..swap.view import view
from ..verify.mode import sinks_in
from .adapters import marked
from .guard import guard_config
from .marks import sinks_in_config


def save_model(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained` of a bidirectional model."""
    with marked(sinks_in(model)):  # where transformers put adapters on, it writes them and nothing else
        return wrapped.__func__(_saved(model, saving_config(model)), *args, **kwargs)


def save_causal(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """`save_pretrained` of a model that is causal, whatever its config says outside of a causal block: the flag is left out."""
    config = _config_without_sinks(model)
    vars(config).pop("is_causal", None)
    return wrapped.__func__(_saved(model, config), *args, **kwargs)


def save_without_sinks(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """`save_pretrained` of a model that has no sinks, though the config that it was made from says so."""
    return wrapped.__func__(_saved(model, _config_without_sinks(model)), *args, **kwargs)


def saving_config(model: Any) -> Any:
    """A copy of `model.config` that says `is_causal: false`, and the sinks, of each wholly bidirectional decoder in `model`."""
    config = copy.deepcopy(model.config)
    pairs = list(zip(parts(model.config), parts(config), strict=True))
    partial = [decoder.module for decoder in decoders(model) if decoder.refusals]
    for module in model.modules():
        if has_mixin(module, BidirectionalModel) and not any(module is p for p in partial):
            own = [saved for live, saved in pairs if live is module.config]
            # Older transformers give the models inside a composite one a copy of their config.
            own = own or [saved for live, saved in pairs if type(live) is type(module.config)]
            for part in own or [config]:
                part.is_causal = False
                _write_sinks(part, sinks_of(module))
    if any(map(sinks_in_config, parts(config))):
        guard_config(config)
    return config


def _config_without_sinks(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    for part in parts(config):
        _write_sinks(part, NO_SINKS)
    return config


def _write_sinks(config: Any, sinks: Sinks) -> None:
    for name, number in sinks._asdict().items():
        vars(config).pop(name, None)
        if sinks != NO_SINKS:
            setattr(config, name, number)


def _saved(model: Any, config: Any) -> Any:
    """A view of `model` with another config, and without a GGUF's marks on weights that are plain numbers by now."""
    attributes: dict[str, Any] = {"config": config}
    quantization = getattr(config, "quantization_config", None)
    is_gguf = "gguf" in str(getattr(quantization, "quant_method", quantization)).lower()
    if is_gguf and _is_plain(model):
        del config.quantization_config
        attributes |= {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}
    return view(model, attributes=attributes)


def _is_plain(model: nn.Module) -> bool:
    return all(parameter.is_floating_point() for parameter in model.parameters())
