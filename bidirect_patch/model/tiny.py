"""A small random model of the same class as a real one, for what depends on the structure of a model, not its weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import BackendError, UnsupportedModelError
from ..swap.classes import original
from .shrink import VOCAB as VOCAB
from .shrink import shrink as shrink
from .wrappers import pretrained as pretrained

_is_building: ContextVar[bool] = ContextVar("_is_building", default=False)


def is_building() -> bool:
    """Whether this thread or task builds a small model now. What its config says of attention is no wish of a user."""
    return _is_building.get()


def tiny_like(
    model_or_config: nn.Module | PretrainedConfig,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a small random model of the class of another model.

    The global random state stays as it was, and the weights are the same each time.

    Args:
        model_or_config: A model, or a module that holds one, gives its class, dtype, device and backend. A config gives
            the class that `AutoModelForCausalLM` names for it, in float32 on the CPU.
        attn_implementation: The attention backend; None keeps that of the model or config.
        trust_remote_code: Whether code that comes with the config may run.

    Returns:
        The model, in eval mode.

    Raises:
        UnsupportedModelError: If the module holds no transformers model, a size in the config is zero or negative, or
            no model can be built from the small config.
        BackendError: If the backend or a package that the model needs is not installed.

    Example:
        >>> from transformers import LlamaConfig
        >>> model = tiny_like(LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=80))
        >>> type(model).__name__, len(model.model.layers)
        ('LlamaForCausalLM', 2)
    """
    dtype, device = torch.float32, torch.device("cpu")
    if isinstance(model_or_config, nn.Module):
        model = pretrained(model_or_config)
        config, build = model.config, original(type(model))._from_config  # type: ignore[attr-defined]
        backend = getattr(config, "_attn_implementation", None)
        tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = tensor.dtype
        device = device if tensor.is_meta else tensor.device
    else:
        config, build = model_or_config, AutoModelForCausalLM.from_config
        # `config._attn_implementation` is "eager" in 4.39 to 4.44 where no backend was chosen; this field is None then.
        backend = getattr(config, "_attn_implementation_internal", None)
    backend = attn_implementation or backend
    options: dict[str, Any] = {"attn_implementation": backend} if isinstance(backend, str) else {}
    if trust_remote_code:
        options["trust_remote_code"] = True
    with _undisturbed(), torch.device("cpu"):
        try:
            small = build(shrink(config), **options)
        except UnsupportedModelError:
            raise
        except ImportError as error:
            raise BackendError(
                f"a small model of {type(config).__name__} needs what isn't installed: {error}"
            ) from error
        except Exception as error:
            raise UnsupportedModelError(
                f"no small model could be built from {type(config).__name__}: {type(error).__name__}: {error}"
            ) from error
        _randomize(small)
    return small.to(device=device, dtype=dtype).eval()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Set the random state, and switch DeepSpeed off. `is_building` is true meanwhile. All is restored at the end.

    Under ZeRO-3 transformers would partition the weights of each model that is built.
    """
    from transformers.integrations import deepspeed

    # transformers 4.39 to 5.24 keep the config of DeepSpeed in this weak reference, and have no function to read it.
    weak_ref = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    before = _is_building.set(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        _is_building.reset(before)
        deepspeed._hf_deepspeed_config_weak_ref = weak_ref


def _randomize(model: nn.Module) -> None:
    # Not the model's own initialization: that may leave gates and output projections at zero, where nothing moves.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                # Normalized queries and keys without a scale of their own would give a softmax that sees one key.
                small = 0.3 if re.search(r"(^|[._])(q|k|query|key)_?(layer)?norm", name) else 1.0
                # What starts small is rescaled by its own forward (nGPT); at 1 it would make a softmax as sharp.
                own = torch.where((parameter != 0) & (parameter.abs() < 1), parameter, 1.0)
                parameter.copy_(own * torch.empty_like(parameter).uniform_(0.5 * small, 1.5 * small))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
