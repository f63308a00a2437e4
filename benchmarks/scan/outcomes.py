"""What becomes of a case: the outputs of the patched model beside those of the twin."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bidirect_patch import BidirectPatchError

EQUAL, BY_DEPENDENCY = "equal", "by dependency"
TOLERANCE = 1e-4  # of the largest value in a tensor
CACHES = ("past_key_values", "cache", "cache_params", "mems", "past_buckets_states", "state")

Call = Callable[[], Any]


def compared(patched: Call, twin: Call, stock: Call, real: Tensor, kept: Any = None) -> str:
    """The outcome of one case.

    Args:
        patched: Calls the patched model.
        twin: Calls the unpatched twin under explicit masks.
        stock: Calls the unpatched model as it is.
        real: (batch, length) bool: the positions that are compared.
        kept: Which positions have logits, if not all.
    """
    try:
        found = patched()
    except BidirectPatchError as error:
        return f"our error: {_in_words(error)}"
    except Exception as error:
        refusal = raised(stock)
        return f"stock refuses too: {refusal}" if refusal else f"crash: {_in_words(error)}"
    try:
        wanted = twin()
    except Exception as error:
        refusal = raised(stock)
        return f"runs where stock does not: {refusal}" if refusal else f"no reference: {_in_words(error)}"
    # Attention weights that stock does not give either, on this backend.
    lacking = {name for name in dict(tensors(wanted)).keys() - dict(tensors(found)).keys() if "attentions" in name}
    if lacking and not lacking & dict(tensors(stock())).keys():
        wanted = {name: value for name, value in tensors(wanted) if name not in lacking}
        found = dict(tensors(found))
    return unlike(found, wanted, real, kept)


def raised(call: Call) -> str | None:
    """The name of the error of a call, None if it runs."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


def unlike(found: Any, wanted: Any, real: Tensor, kept: Any = None) -> str:
    """"equal", or what differs between two outputs at real positions."""
    ours, theirs = dict(tensors(found)), dict(tensors(wanted))
    if list(theirs) == ["logits"]:
        ours = {"logits": ours.get("logits", torch.zeros(0))}
    if "[0]" in ours.keys() & theirs.keys():  # a tuple, in which a cache has no name
        shared = ours.keys() & theirs.keys()
        ours, theirs = ({name: each[name] for name in shared} for each in (ours, theirs))
    if ours.keys() != theirs.keys():
        return f"differs: has {sorted(ours.keys() ^ theirs.keys())[:3]} on one side alone"
    # A gradient that is zero but for rounding, as that of a key's bias, has no scale of its own.
    floor = 1e-3 * max((float(value.abs().max()) for value in theirs.values() if value.numel()), default=0.0)
    for name, expected in theirs.items():
        given = ours[name]
        if given.shape != expected.shape:
            return f"differs: {name} of shape {tuple(given.shape)}, not {tuple(expected.shape)}"
        given, expected = (at_real(each, real, kept).float() for each in (given, expected))
        if not torch.isfinite(given).all() and torch.isfinite(expected).all():
            return f"differs: {name} is not finite"
        difference = float((given - expected).abs().max()) if given.numel() else 0.0
        largest = max(floor, float(expected.abs().max()) if expected.numel() else 0.0)
        if difference > TOLERANCE * largest:
            return f"differs: {name} by {difference / largest:.0e} of its largest value"
    return EQUAL


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating point tensors of an output with their names, without a cache."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name or "output", output.detach()
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if key not in CACHES:
                yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors(value, f"{name}[{i}]")


def at_real(tensor: Tensor, real: Tensor, kept: Any = None) -> Tensor:
    """The part of a tensor that belongs to real positions, whatever its form: by token, by query, kept tokens, or all."""
    batch, length = real.shape
    shape = tuple(tensor.shape)
    if shape[:2] == (batch, length):
        return tensor[real]
    if len(shape) == 4 and shape[0] == batch and shape[2] == length:  # attention weights
        return tensor.transpose(1, 2)[real]
    if len(shape) == 4 and shape[1:3] == (batch, length):  # Gemma 3n's four streams
        return tensor[:, real]
    if len(shape) >= 2 and shape[0] == batch * length:  # of a router
        return tensor.unflatten(0, (batch, length))[real]
    if kept is not None and shape[:2] == (batch, real[:, kept].shape[1]):
        return tensor[real[:, kept]]
    return tensor


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
