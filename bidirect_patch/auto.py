"""`import bidirect_patch.auto`: what is saved as bidirectional opens as bidirectional.

After the import, on every transformers, `from_pretrained` of a checkpoint whose config says `is_causal: false`, or that LLM2Vec
saved, returns an enabled model, as `from_config` of its config does, and an adapter that was trained bidirectionally enables the
model that it is loaded onto, through PEFT or through transformers, with the sink tokens that it was saved with. Within a block,
the model keeps the block's mode, and is enabled when the last block ends. Without the import there is only a warning, once this
package is in use, and an error for a folder with sink tokens.
"""

from typing import Any

import wrapt
from transformers import PreTrainedModel

from .checkpoints import guard, hooks, policy
from .checkpoints.fit import sinks_for_good
from .checkpoints.marks import is_marked, saved_sinks, sinks_on_disk, was_marked
from .errors import OrderError, warn_user
from .model.sinks import NO_SINKS, Sinks
from .patch import enable_after_blocks, enable_bidirectional


def _load_model(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result  # output_loading_info=True
    if policy.enables() and was_marked(model):
        enable_bidirectional(model, **saved_sinks(model)._asdict())
    return result


def _build_model(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    if not policy.enables():
        return wrapped(*args, **kwargs)
    model, is_whole = hooks.build(wrapped, args, kwargs)
    if is_whole and was_marked(model):
        sinks = saved_sinks(model)
        try:
            enable_bidirectional(model, **sinks._asdict())
        except OrderError as error:  # a mask in a buffer without values, on the meta device
            wish = f"the model of this config is to be bidirectional, with {sinks.described}"
            warn_user(f"{wish}, and can't be yet: {error}; then call enable_bidirectional")
    return model


def _load_adapter(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model, where, _ = hooks.adapter_arguments(model, args, kwargs)
    if policy.enables() and where is not None and is_marked(where, **kwargs):
        _enable_for_adapter(model, f"the adapter {where}", sinks_on_disk(where, **kwargs))
    return result


def _hotswap_adapter(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    model, _, sinks = hooks.swapped_in(wrapped, args, kwargs)
    if policy.enables() and sinks is not None:
        _enable_for_adapter(model, hooks.SWAPPED_IN, sinks)
    return result


def _enable_for_adapter(model: Any, what: str, sinks: Sinks) -> None:
    before = sinks_for_good(model)
    if before not in (NO_SINKS, sinks):
        warn_user(
            f"{what} belongs to a model with {sinks.described}, and is loaded onto one with {before.described}, "
            "which is changed to the adapter's. For others, call enable_bidirectional with them afterwards"
        )
    enable_after_blocks(model, sinks)


def _install_peft(module: Any) -> None:
    hooks.put(module.PeftModel, "load_adapter", _load_adapter)


def _install_hotswap(module: Any) -> None:
    hooks.put(module, "hotswap_adapter_from_state_dict", _hotswap_adapter)


hooks.install()
guard.install()
policy.auto_is_imported = True
hooks.put(PreTrainedModel, "from_pretrained", _load_model)
hooks.put(PreTrainedModel, "_from_config", _build_model)
hooks.put(PreTrainedModel, "load_adapter", _load_adapter)
wrapt.register_post_import_hook(_install_peft, "peft.peft_model")
wrapt.register_post_import_hook(_install_hotswap, "peft.utils.hotswap")
