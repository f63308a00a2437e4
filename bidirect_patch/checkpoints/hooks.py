"""Hooks on the cold paths of transformers and PEFT: generate, save and load.

Each is put once on the class with wrapt, when its module is imported, and looks at the instance that it is handed:
models that aren't bidirectional go the stock way.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wrapt

from ..errors import GenerateError, UnsupportedModelError
from ..model.find import decoders
from ..checkpoints.save import (
    fit_adapter_keys,
    holds_bidirectional,
    mark,
    marked,
    save_adapter_config,
    save_causal,
    save_model,
    says_bidirectional,
)

enables = False  # whether loading enables (bidirect_patch.auto) or only warns


@dataclass
class Verbs:
    """What `patch` hands over, so that imports go one way."""

    enable: Callable[[Any], Any]
    is_enabled: Callable[[Any], bool]


verbs: Verbs | None = None


def install(enable: Callable[[Any], Any], is_enabled: Callable[[Any], bool]) -> None:
    """Put every hook in place, once; those on PEFT wait until it is imported."""
    global verbs
    if verbs is not None:
        return
    verbs = Verbs(enable, is_enabled)
    from transformers import GenerationMixin, PreTrainedModel

    wrapt.wrap_function_wrapper(GenerationMixin, "generate", _generate)
    wrapt.wrap_function_wrapper(PreTrainedModel, "save_pretrained", _save_model)
    wrapt.wrap_function_wrapper(PreTrainedModel, "from_pretrained", _load_model)
    wrapt.wrap_function_wrapper(PreTrainedModel, "load_adapter", _load_adapter)
    wrapt.register_post_import_hook(_install_peft, "peft.peft_model")


def _install_peft(module: Any) -> None:
    wrapt.wrap_function_wrapper(module.PeftConfig, "save_pretrained", save_adapter_config)
    wrapt.wrap_function_wrapper(module.PeftModel, "save_pretrained", _save_adapter)
    wrapt.wrap_function_wrapper(module.PeftModel, "load_adapter", _load_adapter)  # from_pretrained calls it too


def _generate(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    if holds_bidirectional(model):
        raise GenerateError(
            f"{type(model).__name__}.generate was called while attention is bidirectional, where left-to-right generation "
            "has no meaning: use `with bidirectional(model, enabled=False): model.generate(...)`"
        )
    return wrapped(*args, **kwargs)


def _load_model(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result  # output_loading_info=True
    config = model.config
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    if enables and verbs and any(getattr(part, "is_causal", True) is False for part in parts):
        if _holds_decoder(model):
            verbs.enable(model)
    return result


def _holds_decoder(model: Any) -> bool:
    """Or it is an encoder, of which `is_causal: false` is true as it is."""
    try:
        return bool(decoders(model))
    except UnsupportedModelError:
        return False


def _save_model(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    if holds_bidirectional(model):
        return save_model(wrapped, model, args, kwargs)
    if verbs and getattr(model.config, "is_causal", True) is False and _holds_decoder(model):
        if not verbs.is_enabled(model):
            return save_causal(wrapped, model, args, kwargs)
    return wrapped(*args, **kwargs)


def _save_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    both = holds_bidirectional(model) or (verbs is not None and verbs.is_enabled(model))
    with marked(model.peft_config.values() if both else ()):
        return wrapped(*args, **kwargs)


def _load_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    if model is None:  # PeftMixedModel, which is no PeftModel, calls it as `PeftModel.load_adapter(self, ...)`
        model, *args = args
    where = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
    if where is None or not says_bidirectional(where, **kwargs):
        return result
    name = (args[1] if len(args) > 1 else kwargs.get("adapter_name")) or "default"
    if name in getattr(model, "peft_config", {}):
        mark(model.peft_config[name])
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "token", "subfolder")}
        fitted = fit_adapter_keys(model, where, name, **hub)
        if fitted is not None and hasattr(result, "missing_keys"):
            # PEFT's own list is of the adapter's keys alone, and it warns of each
            fitted.missing_keys[:] = set(result.missing_keys).intersection(fitted.missing_keys)
            result = fitted
    if verbs is None or verbs.is_enabled(model):
        return result
    if enables:
        verbs.enable(model)
    else:
        warnings.warn(
            f"the adapter {where} was trained with bidirectional attention and was loaded onto a causal model, where it "
            "doesn't belong: call enable_bidirectional(model), or import bidirect_patch.auto before loading",
            stacklevel=3,
        )
    return result
