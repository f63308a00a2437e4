"""The second run of an attention module, on the sink tokens alone, where its kernel takes no mask (FlashAttention)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .flash import SinkRows

# Arguments that say what is real and where sequences begin. A row of sinks needs none of them.
_DROPPED = {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# Arguments that have a value for each position.
_CUT = {"hidden_states", "position_ids", "position_embeddings", "cache_position", "rotary_pos_emb", "freqs_cis"}


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
        cut = {name: _cut(name, value, places, batch, length, name == first) for name, value in given.items()}
        out = forward(**cut)
        states.append((out if isinstance(out, Tensor) else out[0])[:, -1])
    return torch.cat(states)


def put_in(output: Any, sinks: SinkRows, states: Tensor) -> Any:
    """A module's output, a tensor (batch, length, width) or a tuple that begins with one, with these states at the sinks."""
    whole = output if isinstance(output, Tensor) else output[0]
    places = torch.cat([rows[:, -1] for rows in sinks])
    whole = whole.flatten(0, 1).index_copy(0, places, states).view(whole.shape)
    return whole if isinstance(output, Tensor) else (whole, *output[1:])


def _cut(name: str, value: Any, places: Tensor, batch: int, length: int, is_input: bool) -> Any:
    """One argument of the call for rows of sinks, at `places` (rows, tokens)."""
    if name in _DROPPED:
        return None
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(_cut(name, each, places, batch, length, is_input) for each in value)
    if not isinstance(value, Tensor):
        return value
    if is_input or name in _CUT:
        if value.dim() == 1 and value.shape[0] == length:  # cache_position
            return value[: places.shape[1]]
        for axis in range(value.dim() - 1):  # the first are the kinds of a multimodal position
            if value.shape[axis] in (1, batch) and value.shape[axis + 1] == length:
                whole = value.movedim((axis, axis + 1), (0, 1)).expand(batch, length, *value.shape[:axis], *value.shape[axis + 2 :])
                return whole.flatten(0, 1)[places].movedim((0, 1), (axis, axis + 1))
    raise UnsupportedModelError(
        f"sink tokens on FlashAttention: an attention module was given {name} of shape {tuple(value.shape)}, which can't be cut "
        "to the sinks. Use attn_implementation='sdpa'"
    )
