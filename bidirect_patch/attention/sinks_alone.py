"""The second run of an attention module, on the sink tokens alone, where its kernel takes no mask (FlashAttention)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .flash import SinkRows

# Arguments that say what is real and where sequences begin. A row of sinks needs none of them.
_DROPPED = {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def cut_to_sinks(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], sinks: SinkRows
) -> Iterator[dict[str, Any]]:
    """The arguments with which a module's own forward runs on the sinks alone: one call for each of `sinks`.

    Args:
        names: of the forward's positional arguments.
        args: of the call, as the whole batch gets them.
        kwargs: of the call.
        sinks: see `SinkRows`.

    Raises:
        UnsupportedModelError: an argument of which it isn't known how to cut it to the sinks.
    """
    given = {**dict(zip(names, args)), **kwargs}
    batch, length = given[names[0]].shape[:2]
    for places in sinks:
        yield {name: _cut(name, value, places, batch, length) for name, value in given.items()}


def put_in(output: Any, sinks: SinkRows, alone: Sequence[Any]) -> Any:
    """A module's output, a tensor (batch, length, width) or a tuple that begins with one, with the sinks' states out of `alone`.

    Args:
        output: of the whole batch.
        sinks: see `SinkRows`.
        alone: what the module gives for each of `sinks`, in the same form.
    """
    whole = _states(output)
    places = torch.cat([rows[:, -1] for rows in sinks])
    states = torch.cat([_states(each)[:, -1] for each in alone])
    whole = whole.flatten(0, 1).index_copy(0, places, states).view(whole.shape)
    return whole if isinstance(output, Tensor) else (whole, *output[1:])


def _states(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


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
