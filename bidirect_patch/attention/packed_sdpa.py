"""Faster ways to call SDPA: one call per packed sequence, or the sink tokens apart.

On a CPU, SDPA over one row of many sequences computes every pair of positions, and a mask throws most of them away. So the
mask of a packed row carries the lengths of its sequences to the one call that can use them. To everything else that a model
does with it, it is the plain mask.

On a GPU, a mask keeps SDPA from its fastest kernels. So where a mask is there for the sinks alone, it carries their number,
and SDPA runs once on the sinks and once on the other tokens, without a mask. On a CPU, a mask costs nothing.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..model.windows import Span
from ..swap.recording import values_are_unknown
from .padding_and_packing import Sequences

# What one more call of SDPA costs, in pairs of positions: forward and backward on a CPU, heads of 64, as measured.
PAIRS_PER_CALL = 2048


class Lengths(NamedTuple):
    """The sequences of a packed row, one behind the other."""

    lengths: list[int]  # tokens per sequence
    masks: dict[int, Tensor | None]  # by length: bool (length, length), what a window and sinks leave visible; None: everything


class SinksApart(NamedTuple):
    """Rows that are neither padded nor packed, of which only sinks are hidden or don't see all."""

    sinks: int
    sees_sinks: bool


class PackedMasks(Tensor):
    """A mask (batch, spans, length, length) that knows the sequences of its rows; see `pick`."""

    by_span: list[Lengths | SinksApart | None]
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # what is computed of it is a plain tensor


class PackedMask(Tensor):
    """A mask (batch, 1, length, length) with which SDPA runs once per sequence, or once on the sinks and once on the others."""

    sequences: Lengths | SinksApart

    @classmethod
    def of(cls, mask: Tensor, sequences: Lengths | SinksApart) -> "PackedMask":
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
    """`mask`, which carries the lengths of the row's sequences or the number of sinks where running each alone is faster."""
    if sequences.real is not None or values_are_unknown():
        return mask
    by_span: list[Lengths | SinksApart | None]
    if sequences.number is not None:
        by_span = [lengths_of(sequences, span) for span in spans]
    else:
        by_span = [sinks_apart(sequences, span) for span in spans] if sequences.device.type != "cpu" else []
    if not any(by_span):
        return mask
    masks = mask.as_subclass(PackedMasks)
    masks.by_span = by_span
    return masks


def sinks_apart(sequences: Sequences, span: Span) -> SinksApart | None:
    """The sinks of rows that are neither padded nor packed, where nothing else is hidden."""
    if not span.sinks or span._replace(sinks=0).hides_within(sequences.length) or span.sinks >= sequences.length:
        return None
    return SinksApart(span.sinks, span.sees_sinks)


def pick(mask: Tensor, span: int, channels: Tensor) -> Tensor:
    """`channels`, what `mask` holds for the span with this index, as a PackedMask where `mask` knows the sequences."""
    if not isinstance(mask, PackedMasks):
        return channels
    sequences = mask.by_span[span]
    return channels if sequences is None else PackedMask.of(channels, sequences)


def lengths_of(sequences: Sequences, span: Span) -> Lengths | None:
    """The sequences of a packed row in a layer of this span, where running each alone is faster; else None."""
    if sequences.batch != 1 or sequences.device.type != "cpu":  # on a GPU a call costs more, and FlashAttention is there
        return None
    if span.sinks and span.chunk is not None:  # the first chunk of a sequence has sinks, the others have none
        return None
    lengths = [len(list(run)) for _, run in groupby(sequences.chunked(span.chunk)[0].tolist())]
    saved = sum(lengths) ** 2 - sum(n * n for n in lengths)
    if saved <= PAIRS_PER_CALL * len(lengths):
        return None
    return Lengths(lengths, {n: _within(n, span._replace(chunk=None)) for n in set(lengths)})


def _within(length: int, span: Span) -> Tensor | None:
    if not span.hides_within(length):
        return None
    return Sequences(1, length, torch.device("cpu"), None, None).visible(span)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """query, key, value: (batch, heads, length, dim). A call of another shape is the plain one."""
    rows = (query, key, value)
    kwargs["dropout_p"] = dropout_p
    if not isinstance(attn_mask, PackedMask) or any(
        x.dim() != 4 or x.shape[0] != attn_mask.shape[0] or x.shape[2] != attn_mask.shape[-1] for x in rows
    ):
        return scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **kwargs)
    if isinstance(attn_mask.sequences, SinksApart):
        sinks, sees_sinks = attn_mask.sequences
        q, k, v = (x[:, :, :sinks] for x in rows)
        first = scaled_dot_product_attention(q, k, v, is_causal=sinks > 1, **kwargs)
        seen = (key, value) if sees_sinks else (key[:, :, sinks:], value[:, :, sinks:])
        return torch.cat([first, scaled_dot_product_attention(query[:, :, sinks:], *seen, **kwargs)], 2)
    lengths, masks = attn_mask.sequences
    parts = zip(*(x.split(lengths, dim=2) for x in rows))
    outs = [scaled_dot_product_attention(q, k, v, masks[q.shape[2]], **kwargs) for q, k, v in parts]
    return torch.cat(outs, 2)
