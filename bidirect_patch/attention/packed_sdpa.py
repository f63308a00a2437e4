"""SDPA over a packed row, sequence by sequence.

On a CPU, SDPA over one row of many sequences computes every pair of positions, and a mask throws most of them away. So the
mask of a packed row carries the lengths of its sequences to the one call that can use them. To everything else that a model
does with it, it is the plain mask.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..model.windows import Span
from .padding_and_packing import Sequences, in_window, is_graph_captured

# What one more call of SDPA costs, in pairs of positions: forward and backward on a CPU, heads of 64, as measured.
PAIRS_PER_CALL = 2048


class Lengths(NamedTuple):
    """The sequences of a packed row, one behind the other."""

    lengths: list[int]  # tokens per sequence
    windows: dict[int, Tensor | None]  # by length: bool (length, length), what a window leaves visible; None: everything


class PackedMasks(Tensor):
    """A mask (1, spans, length, length) that knows the sequences of its row; see `pick`."""

    by_span: list[Lengths | None]
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # what is computed of it is a plain tensor


class PackedMask(Tensor):
    """A mask (1, 1, length, length) with which SDPA runs once per sequence."""

    sequences: Lengths

    @classmethod
    def of(cls, mask: Tensor, sequences: Lengths) -> "PackedMask":
        """`mask` as a PackedMask; the data is shared."""
        packed = mask.as_subclass(cls)
        packed.sequences = sequences
        return packed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            out = func(*args, **kwargs)
            # Models cut a mask to the number of keys, which cuts nothing off here.
            whole = func is Tensor.__getitem__ and out.shape == args[0].shape
        return cls.of(out, args[0].sequences) if whole else out


def with_lengths(mask: Tensor, sequences: Sequences, spans: tuple[Span, ...]) -> Tensor:
    """`mask`, which carries the lengths of the row's sequences where running each alone is faster."""
    if sequences.number is None or sequences.real is not None or is_graph_captured():
        return mask
    by_span = [lengths_of(sequences.chunked(span.chunk), span.window) for span in spans]
    if not any(by_span):
        return mask
    masks = mask.as_subclass(PackedMasks)
    masks.by_span = by_span
    return masks


def pick(mask: Tensor, span: int, channels: Tensor) -> Tensor:
    """`channels`, what `mask` holds for the span with this index, as a PackedMask where `mask` knows the sequences."""
    if not isinstance(mask, PackedMasks):
        return channels
    sequences = mask.by_span[span]
    return channels if sequences is None else PackedMask.of(channels, sequences)


def lengths_of(numbers: Tensor, window: int | None) -> Lengths | None:
    """The sequences of a row, where running each alone is faster; else None.

    Args:
        numbers: (batch, length), int, which sequence each position belongs to.
        window: |q - k| < window within each.
    """
    if numbers.shape[0] != 1 or numbers.device.type != "cpu":  # on a GPU a call costs more, and FlashAttention is there
        return None
    lengths = [len(list(run)) for _, run in groupby(numbers[0].tolist())]
    saved = sum(lengths) ** 2 - sum(n * n for n in lengths)
    if saved <= PAIRS_PER_CALL * len(lengths):
        return None
    return Lengths(lengths, {n: _window(n, window) for n in set(lengths)})


def _window(length: int, window: int | None) -> Tensor | None:
    if window is None or length <= window:
        return None
    index = torch.arange(length)
    return in_window(index[:, None], index[None, :], window)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """query, key, value: (1, heads, length, dim). A call of another shape is the plain one."""
    rows = (query, key, value)
    if not isinstance(attn_mask, PackedMask) or any(
        x.dim() != 4 or x.shape[0] != 1 or x.shape[2] != attn_mask.shape[-1] for x in rows
    ):
        return scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    lengths, windows = attn_mask.sequences
    parts = zip(*(x.split(lengths, dim=2) for x in rows))
    outs = [scaled_dot_product_attention(q, k, v, windows[q.shape[2]], *args, **kwargs) for q, k, v in parts]
    return torch.cat(outs, 2)
