"""PEFT adapters: the mark that one was trained bidirectionally, and weights whose names are those of another wrapper.

An adapter has no config.json (with one beside it, transformers takes the folder for a whole model), so its
adapter_config.json gets the flag, where PEFT keeps what it knows of the base model: `"auto_mapping": {"is_causal": false}`. Sink
tokens stand beside it, and then PEFT alone does not open the adapter (`guard`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..model.sinks import NO_SINKS, Sinks
from .guard import guard_adapter

_MARK = "_bidirect_patch_bidirectional"  # on the PEFT config of an adapter that belongs to bidirectional attention
_marks_all: ContextVar[Sinks | None] = ContextVar("_marks_all", default=None)


def mark(adapter: Any, sinks: Sinks) -> None:
    """Have every file that this PEFT config is saved to say `is_causal: false` and these sinks."""
    setattr(adapter, _MARK, sinks)


@contextmanager
def marked(sinks: Sinks | None) -> Iterator[None]:
    """Have every adapter that this thread or task saves within the block say so; None: it is causal."""
    before = _marks_all.set(sinks)
    try:
        yield
    finally:
        _marks_all.reset(before)


def save_adapter_config(wrapped: Any, adapter: Any, args: Any, kwargs: Any) -> Any:
    """`PeftConfigMixin.save_pretrained`, which every way to save an adapter calls before anything is uploaded."""
    sinks = _marks_all.get()
    sinks = getattr(adapter, _MARK, None) if sinks is None else sinks
    known = {**(kwargs.get("auto_mapping_dict") or getattr(adapter, "auto_mapping", None) or {})}
    for name in Sinks._fields:  # of another time
        known.pop(name, None)
    if sinks is None:
        return wrapped(*args, **kwargs)
    numbers = {} if sinks == NO_SINKS else sinks._asdict()
    result = wrapped(*args, **{**kwargs, "auto_mapping_dict": {**known, "is_causal": False, **numbers}})
    if numbers:
        guard_adapter(args[0] if args else kwargs["save_directory"])
    return result


def fit_adapter_keys(model: Any, where: Any, name: str, **hub: Any) -> Any:
    """Load an adapter's weights again under this model's names if PEFT did not match them. Returns PEFT's result.

    LLM2Vec's are for a bare `LlamaModel` (`base_model.model.layers...`); a `*ForCausalLM` has one `model.` more.

    Args:
        model: the PEFT model.
        where: folder or hub name of the adapter.
        name: the adapter's name in `model`.
        hub: revision, cache_dir, token, subfolder.
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
    if all(key in now and _is_same(now[key], weight) for key, weight in fitted.items()):
        return None
    how = {"low_cpu_mem_usage": True} if any(p.is_meta for p in model.parameters()) else {}
    return set_peft_model_state_dict(model, fitted, adapter_name=name, **how)


def _is_same(now: torch.Tensor, weight: torch.Tensor) -> bool:
    return not now.is_meta and torch.equal(now.cpu(), weight.to(now.dtype))
