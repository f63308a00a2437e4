"""The second run of an attention module, on the sink tokens alone, where its kernel takes no mask (FlashAttention)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .flash import SinkRows

# Arguments that say what is real and where sequences begin. A row of sinks needs none of them.
_DROPPED = {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def run_alone(
    forward: Callable[..., Any], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], sinks: SinkRows
) -> Tensor:
    """What attention gives the sinks: (all sinks, width), in the order of `sinks`.

    Args:
        forward: the module's own.
        names: of its positional arguments.
        args: of the call, as the whole batch gets them.
        kwargs: of the call.
        sinks: see `SinkRows`.

    Raises:
        UnsupportedModelError: an argument of which it isn't known how to cut it to the sinks.
    """
    given = {**dict(zip(names, args)), **kwargs}
    first = names[0]
    batch, length = given[first].shape[:2]
    states = []
    for places in sinks:
        cut = {name: _cut(name, value, places, batch, length) for name, value in given.items()}
        out = forward(**cut)
        states.append((out if isinstance(out, Tensor) else out[0])[:, -1])
    return torch.cat(states)


def put_in(output: Any, sinks: SinkRows, states: Tensor) -> Any:
    """A module's output, a tensor (batch, length, width) or a tuple that begins with one, with these states at the sinks."""
    whole = output if isinstance(output, Tensor) else output[0]
    places = torch.cat([rows[:, -1] for rows in sinks])
    whole = whole.flatten(0, 1).index_copy(0, places, states).view(whole.shape)
    return whole if isinstance(output, Tensor) else (whole, *output[1:])


def _cut(name: str, value: Any, places: Tensor, batch: int, length: int) -> Any:
    """One argument of the call for rows of sinks, at `places` (rows, tokens)."""
    if name in _DROPPED:
        return None
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(_cut(name, each, places, batch, length) for each in value)
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    if value.dim() == 1:  # cache_position
        return value[: places.shape[1]]
    for row, axis in _axes(value, batch, length):
        whole = value.movedim((row, axis), (0, 1))
        return whole.expand(batch, *whole.shape[1:]).flatten(0, 1)[places].movedim((0, 1), (row, axis))
    raise UnsupportedModelError(
        f"sink tokens on FlashAttention: an attention module was given {name} of shape {tuple(value.shape)}, which can't be cut "
        "to the sinks. Use attn_implementation='sdpa'"
    )


def _axes(value: Tensor, batch: int, length: int) -> Iterator[tuple[int, int]]:
    """The axes of the rows and of the positions of a tensor (..., 1 or batch, ..., length, ...), the likeliest first.

    The rows are the last axis of their number before the positions (multimodal positions have one for kinds before them), or,
    where all rows share the values, the first axis of one.
    """
    for axis in (i for i, size in enumerate(value.shape) if size == length):
        of_batch = [i for i in range(axis) if value.shape[i] == batch > 1]
        shared = [i for i in range(axis) if value.shape[i] == 1]
        for row in (*of_batch[-1:], *shared[:1]):
            yield row, axis
