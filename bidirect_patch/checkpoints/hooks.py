"""Hooks on transformers, PEFT and accelerate, where they generate, save and load.

Each is put once on the class, with wrapt. It looks at the instance that it is given: models that aren't bidirectional go
the stock way.
"""

import inspect
from typing import Any

import wrapt
from torch import nn

from ..attention.mixed import holds_open
from ..attention.model_forward import check_not_in_others_block, holds_causal_block
from ..errors import BidirectPatchError, GenerateError, warn_user
from ..model.config import parts
from ..model.find import holds_decoder
from ..model.sinks import Sinks
from ..model.tiny import is_building
from ..model.under_way import is_under_construction
from ..model.walk import modules_of
from ..swap import in_use
from ..swap.classes import is_open
from ..verify.late import verify_kernel
from ..verify.mode import check_not_mixed, is_bidirectional, sinks_in
from . import policy
from .adapters import fit_adapter_keys, mark, marked, save_adapter_config
from .fit import warn_of_misfit
from .guard import read_adapter_config
from .marks import (
    HUB_OPTIONS,
    is_marked,
    marked_sinks,
    saved_sinks,
    sinks_in_config,
    sinks_on_disk,
    was_marked,
)
from .save import save_causal, save_model, save_without_sinks

_put: list[tuple[Any, str, Any]] = []  # class, method, what the class itself had there


def install() -> None:
    """Put every hook in place, once. Those on PEFT and accelerate wait until these are imported."""
    with in_use.lock:
        if not _put:
            try:
                _install()
            except BaseException:
                uninstall()
                raise


def _install() -> None:
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

    put(PretrainedConfig, "save_pretrained", _save_config)
    put(GenerationMixin, "generate", _generate)
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        if hasattr(GenerationMixin, name):
            put(GenerationMixin, name, _generate_in_a_thread)
    if hasattr(GenerationMixin, "init_continuous_batching"):  # what it makes may be older than the patch
        manager = inspect.unwrap(GenerationMixin.init_continuous_batching).__globals__["ContinuousBatchingManager"]
        for name in ("start", "add_request"):
            put(manager, name, _run_in_a_thread)
    if hasattr(PreTrainedModel, "set_attn_implementation"):
        put(PreTrainedModel, "set_attn_implementation", _set_attention)
    put(PreTrainedModel, "save_pretrained", _save_model)
    put(PreTrainedModel, "from_pretrained", _load_model)
    put(PreTrainedModel, "_from_config", _build_model)  # AutoModel's `from_config` calls it
    put(PreTrainedModel, "load_adapter", _load_adapter)
    wrapt.register_post_import_hook(_install_peft, "peft.peft_model")
    wrapt.register_post_import_hook(_install_hotswap, "peft.utils.hotswap")
    wrapt.register_post_import_hook(_install_accelerate, "accelerate.accelerator")


def put(cls: Any, name: str, wrapper: Any) -> None:
    """Put a wrapt wrapper on a method of a class, on top of what is there."""
    _put.append((cls, name, cls.__dict__.get(name)))
    wrapt.wrap_function_wrapper(cls, name, wrapper)


def uninstall() -> None:
    """Take every hook off again, the last one first. Wrappers of others that were put on top since go with them."""
    while _put:
        cls, name, before = _put.pop()
        if before is None:  # the method is inherited
            delattr(cls, name)
        else:
            setattr(cls, name, before)


def _install_peft(module: Any) -> None:
    if _put:
        put(module.PeftConfig, "save_pretrained", save_adapter_config)
        put(module.PeftConfig, "from_json_file", read_adapter_config)
        put(module.PeftModel, "save_pretrained", _save_adapter)
        put(module.PeftModel, "load_adapter", _load_adapter)  # from_pretrained calls it too


def _install_hotswap(module: Any) -> None:
    if _put:
        # by its name in the module: who has imported `hotswap_adapter` before calls it too
        put(module, "hotswap_adapter_from_state_dict", _hotswap_adapter)


def _install_accelerate(module: Any) -> None:
    if _put and hasattr(module, "Accelerator"):  # not where this module is only half imported
        put(module.Accelerator, "save_model", _save_weights)


def _generate(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    try:
        check_not_mixed(model)
        if holds_open(model):
            raise GenerateError(
                f"{type(model).__name__}.{wrapped.__name__} was called while attention is bidirectional, where left-to-right "
                f"generation has no meaning: use `with bidirectional(model, enabled=False): model.{wrapped.__name__}(...)`"
            )
        return wrapped(*args, **kwargs)
    except BidirectPatchError:
        if kwargs.get("streamer") is not None:  # who reads from it would wait for ever
            kwargs["streamer"].end()
        raise


def _generate_in_a_thread(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """The methods whose forwards run in a thread of their own, where an error would only be logged."""
    _check_causal_for_good(model, f"{type(model).__name__}.{wrapped.__name__}")
    return wrapped(*args, **kwargs)


def _run_in_a_thread(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
    """The same for what was made by such a method while the model was causal."""
    _check_causal_for_good(manager.model, f"{type(manager).__name__}.{wrapped.__name__}")
    return wrapped(*args, **kwargs)


def _check_causal_for_good(model: Any, called: str) -> None:
    if holds_open(model) or holds_causal_block(model):
        raise GenerateError(
            f"{called} was called on a bidirectional model. It generates in a thread of its own, for which no block holds: call "
            "disable_bidirectional(model) first, or give it a causal copy"
        )


def _set_attention(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """Another attention function is verified like the first one; one that stays causal is refused, and the old one put back."""
    if not holds_open(model):
        return wrapped(*args, **kwargs)
    from transformers import PreTrainedModel

    models = (module for module in modules_of(model) if isinstance(module, PreTrainedModel))
    before = [(each.config, each.config._attn_implementation) for each in models]
    result = wrapped(*args, **kwargs)
    try:
        verify_kernel(model)
    except BaseException:
        for config, name in before:
            config._attn_implementation = name
        raise
    return result


def _save_model(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    check_not_in_others_block(model)
    check_not_mixed(model)
    if holds_open(model):
        return save_model(wrapped, model, args, kwargs)
    says_both_ways = getattr(model.config, "is_causal", True) is False and holds_decoder(model)
    if holds_causal_block(model) or (says_both_ways and not is_bidirectional(model)):
        return save_causal(wrapped, model, args, kwargs)
    if any(map(sinks_in_config, parts(model.config))):  # made from such a config, and never patched
        return save_without_sinks(wrapped, model, args, kwargs)
    return wrapped(*args, **kwargs)


def _save_config(wrapped: Any, config: Any, args: Any, kwargs: Any) -> Any:
    """A config by itself doesn't know its model: `save_pretrained` of the model writes the flag into a copy of it."""
    own = list(map(id, parts(config)))
    for decoder in in_use.decoders():
        if is_open(decoder) and id(decoder.config) in own and getattr(decoder.config, "is_causal", True) is not False:
            warn_user(
                f"the config of a bidirectional {type(decoder).__name__} was saved by itself, without \"is_causal\": false: what "
                "is opened from there is causal. Call save_pretrained of the model"
            )
            break
    return wrapped(*args, **kwargs)


def _save_weights(wrapped: Any, accelerator: Any, args: Any, kwargs: Any) -> Any:
    """`Accelerator.save_model` writes the weights, and no config that could hold the flag."""
    model = args[0] if args else kwargs.get("model")
    if isinstance(model, nn.Module) and holds_open(model):
        warn_user(
            f"Accelerator.save_model writes the weights of a bidirectional {type(model).__name__}, and nothing that says so: "
            "what is opened from there is causal. Call save_pretrained of the model, or enable the model that takes the weights"
        )
    return wrapped(*args, **kwargs)


def _save_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    check_not_in_others_block(model)
    check_not_mixed(model)
    with marked(sinks_in(model) if holds_open(model) or is_bidirectional(model) else None):
        return wrapped(*args, **kwargs)


def _load_model(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    with policy.loading():
        result = wrapped(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result  # output_loading_info=True
    if policy.warns() and was_marked(model):
        warn_of_misfit(f"the checkpoint {args[0] if args else ''}", "is loaded as", model, saved_sinks(model))
    return result


def _build_model(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    model, is_whole = build(wrapped, args, kwargs)
    if is_whole and policy.warns() and was_marked(model):
        warn_of_misfit("the model of this config", "is built as", model, saved_sinks(model))
    return model


def build(wrapped: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """A model made from a config alone, and whether a user asked for it; its weights may be loaded later."""
    with policy.loading() as is_outermost:
        return wrapped(*args, **kwargs), is_outermost and not is_building() and not is_under_construction()


def _load_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model, where, name = adapter_arguments(model, args, kwargs)
    if where is None or not is_marked(where, **kwargs):
        return result
    sinks = sinks_on_disk(where, **kwargs)
    if name in getattr(model, "peft_config", {}):
        mark(model.peft_config[name], sinks)
        hub = {k: v for k, v in kwargs.items() if k in HUB_OPTIONS}
        fitted = fit_adapter_keys(model, where, name, **hub)
        if fitted is not None and hasattr(result, "missing_keys"):
            # PEFT's own list is of the adapter's keys alone, and it warns of each
            fitted.missing_keys[:] = set(result.missing_keys).intersection(fitted.missing_keys)
            result = fitted
    if policy.warns():
        warn_of_misfit(f"the adapter {where}", "is loaded onto", model, sinks)
    return result


def _hotswap_adapter(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    """PEFT's function that gives a model's adapter the weights of another one, whose attention the model may not have."""
    result = wrapped(*args, **kwargs)
    model, name, sinks = swapped_in(wrapped, args, kwargs)
    if sinks is not None:
        mark(model.peft_config[name], sinks)
        if policy.warns():
            warn_of_misfit(SWAPPED_IN, "is loaded onto", model, sinks)
    return result


SWAPPED_IN = "the adapter that was swapped in"


def swapped_in(wrapped: Any, args: Any, kwargs: Any) -> tuple[Any, str, Sinks | None]:
    """Of a swap of adapters: the model, the adapter's name, and its sinks if it belongs to bidirectional attention."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    return given["model"], given["adapter_name"], marked_sinks(given["config"].to_dict())


def adapter_arguments(model: Any, args: Any, kwargs: Any) -> tuple[Any, Any, str]:
    """Of a call of `load_adapter`: the model, where the adapter is, and the adapter's name."""
    if model is None:  # PeftMixedModel, which is no PeftModel, calls it as `PeftModel.load_adapter(self, ...)`
        model, *args = args
    where = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
    return model, where, (args[1] if len(args) > 1 else kwargs.get("adapter_name")) or "default"
