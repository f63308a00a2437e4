"""The reference of the scan: a model without the patch, whose attention modules are handed explicit masks, on eager attention.

The mask that the model makes by itself says which keys a layer may see: its past, within its window. The explicit mask lets
two tokens of one text see each other where one of them could see the other before. Nothing here comes from the patch.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from tests.helpers.zoo import RELEASE

MASKS = ("attention_mask", "attn_mask", "mask")
# Families whose eager masks have no window (Moshi), or have it in all layers, and not in those that the config says; in which
# releases. FlashAttention follows the config.
OWN_WINDOWS = {
    "moshi": "",
    "qwen2_moe": ">=4.53,<5",
    **dict.fromkeys(("mixtral", "phi3", "qwen2", "starcoder2"), "==4.44.*"),
}
Windows = Callable[[nn.Module], int | None]
BIASES = ("alibi", "position_bias")  # of ALiBi: one for each key


@contextmanager
def explicit_masks(
    model: nn.Module, allowed: Tensor, opens_windows: bool = False, windows: Windows | None = None, longest: int | None = None
) -> Iterator[None]:
    """A block in which each attention module of `model` gets an explicit mask.

    Args:
        model: An unpatched model. Call `open_buffers` on it first.
        allowed: (batch, query, key) bool: the tokens of one text, without padding.
        opens_windows: Whether layers with a window see all of the text too, as under a ready mask of the user.
        windows: Gives the window of an attention module, where the model's own masks have others; see `told_windows`.
        longest: The window of layers whose own mask has one, where that is of another length.
    """
    positions = torch.arange(allowed.shape[-1])
    distance = (positions[:, None] - positions).abs()
    near = allowed & (distance < longest) if longest is not None and not opens_windows else allowed

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = _parameters(type(module))
        given = dict(zip(names, args))

        def put(name: str, value: Any) -> None:
            (given if name in given else kwargs)[name] = value

        for name in {**dict.fromkeys(names), **kwargs}:
            value = given.get(name, kwargs.get(name))
            if name in MASKS and windows is not None:
                window = None if opens_windows else windows(module)
                seen = allowed if window is None else allowed & (distance < window)
                put(name, torch.zeros(seen[:, None].shape).masked_fill(~seen[:, None], torch.finfo(torch.float32).min))
            elif name in MASKS and isinstance(value, Tensor):
                put(name, _explicit(value, allowed, near, opens_windows))
            elif name in BIASES and isinstance(value, Tensor) and value.shape[-2] == 1:
                bias = value[..., -allowed.shape[-1] :]  # MPT's is as long as the longest text
                put(name, -(bias - bias.mT).abs())
            elif name == "position_ids" and hasattr(getattr(module, "indexer", None), "build_block_mask"):
                # MiniMax-M3's sparse layers find the future by comparing positions: from the last one, there is none.
                put(name, torch.full_like(value, allowed.shape[-1] - 1))
        return (*given.values(), *args[len(given) :]), kwargs

    hooks = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in model.modules()
        if re.search("Attention|Attn|MLA$", type(module).__name__) and {*MASKS, *BIASES} & {*_parameters(type(module))}
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def told_windows(model: nn.Module) -> Windows | None:
    """The window of an attention module by the config, in families whose own eager masks do not follow it; else None."""
    config = model.config
    if RELEASE not in SpecifierSet(OWN_WINDOWS.get(config.model_type, "<0")):
        return None
    first = getattr(config, "max_window_layers", 0)
    return lambda module: config.sliding_window if module.layer_idx >= first else None


def open_buffers(model: nn.Module) -> nn.Module:
    """Mirror the buffers in which a model keeps a causal mask (GPT-2 of older releases, GPT-Neo, ...), in place."""
    for buffer in model.buffers():
        if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1 and _is_triangular(buffer):
            buffer.copy_(torch.maximum(buffer, buffer.mT))
    return model


def _is_triangular(buffer: Tensor) -> bool:
    return bool((buffer.tril() == buffer).all() and (buffer.diagonal(dim1=-2, dim2=-1) != 0).all())


def _explicit(mask: Tensor, allowed: Tensor, near: Tensor, opens_windows: bool) -> Tensor:
    """The explicit form of a mask that a model made, in the same terms; `near` is allowed where the mask has a window."""
    length = allowed.shape[-1]
    if mask.shape[-2] != length or mask.shape[-1] not in (length, length + 1):
        return mask  # padding alone, or the keys of another sequence
    mask = mask[..., :length]  # older releases leave room for one more key
    if mask.dim() == 2:  # CTRL's: 1 where the future is
        return torch.minimum(mask, mask.mT)
    # Families that made their own masks have said True for visible, or True for hidden. The first token sees no later one.
    hides = not mask.is_floating_point() and bool(mask[..., 0, -1].all())
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool() ^ hides
    has_window = bool((allowed.tril() & ~(seen if mask.dim() == 3 else seen[:, 0])).any())
    allowed = near if has_window else allowed
    seen = (seen | seen.mT | opens_windows) & (allowed if mask.dim() == 3 else allowed[:, None])
    if mask.is_floating_point():
        hidden = -torch.inf if torch.isinf(mask).any() else torch.finfo(mask.dtype).min
        return torch.zeros_like(mask).masked_fill(~seen, hidden)
    return (seen ^ hides).to(mask.dtype)


@cache
def _parameters(cls: type) -> tuple[str, ...]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]  # a module
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
