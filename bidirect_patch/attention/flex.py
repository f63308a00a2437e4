"""Masks for FlexAttention: a BlockMask made of padding, packing and windows.

The mask function reads its tensors at the key's index only, and compares the query's index with what they hold: torch's
compiler for CPUs can't read a captured tensor at the query's index once it has seen several lengths.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..model.windows import Span
from .padding_and_packing import Sequences, run_starts

_BLOCK = 128  # queries and keys of a block, as in torch's create_block_mask


class SpanBlockMasks(BlockMask):
    """The BlockMask of a decoder's first span, which carries those of its other spans: a BlockMask has no channels."""

    others: list[BlockMask]


def block_masks(sequences: Sequences, spans: tuple[Span, ...]) -> BlockMask:
    """The BlockMask of the only span, or a `SpanBlockMasks`."""
    first: Any
    first, *others = [_block_mask(sequences, span) for span in spans]
    if others:
        first.__class__ = SpanBlockMasks
        first.others = others
    return first


def _block_mask(sequences: Sequences, span: Span) -> BlockMask:
    """The BlockMask of one span, from the queries that see each key: no (query, key) table is made for it."""
    first, last = _seen_by(sequences, span)
    length, size = sequences.length, _BLOCK

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first[b, k] <= q) & (q < last[b, k])

    # (batch, 1, query block, key block, key of the block); a key past the end is seen by nobody.
    past = -length % size
    shape = (sequences.batch, 1, 1, (length + past) // size, size)
    firsts, lasts = (torch.nn.functional.pad(each, (0, past)).view(shape) for each in (first, last))
    begin = (torch.arange(shape[3], device=sequences.device) * size)[:, None, None]
    some = ((firsts < begin + size) & (begin < lasts) & (firsts < lasts)).any(-1)
    every = ((firsts <= begin) & (begin + size <= lasts)).all(-1)
    mask = BlockMask.from_kv_blocks(*_counted(some & ~every), *_counted(every), BLOCK_SIZE=size, mask_mod=visible)
    mask.seq_lengths = (length, length)
    return mask


def _counted(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, int32 (..., query block), and their numbers, first, int32 (..., key block)."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _seen_by(sequences: Sequences, span: Span) -> tuple[Tensor, Tensor]:
    """int64 (batch, length) twice: each key is seen by the queries from the first number up to, not with, the second.

    Padding belongs to the sequence before it, and at the left end of a row to the first one, so that padded queries see
    something; with sink tokens it sees nothing there, which FlexAttention makes zeros of. A padded key is seen by nobody, but in
    a row of padding alone.
    """
    length = sequences.length
    number = sequences.chunked(span.chunk)
    begins = run_starts(number)
    index = torch.arange(length, device=sequences.device).expand_as(number)
    first = torch.where(begins, index, 0).cummax(-1).values
    after = torch.where(begins, index, length).flip(-1).cummin(-1).values.flip(-1)  # the next beginning, from here on
    last = torch.cat([after[:, 1:], torch.full_like(after[:, :1], length)], 1)
    if span.window is not None:
        first, last = torch.maximum(first, index - span.window + 1), torch.minimum(last, index + span.window)
    if span.sinks:
        first, last = _past_sinks(sequences, span, first, last)
    if sequences.real is None:
        return first, last
    hidden = ~sequences.real & sequences.real.any(-1, keepdim=True)
    return first, last.masked_fill(hidden, 0)


def _past_sinks(sequences: Sequences, span: Span, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """`first` and `last` of each key with sink tokens: a sink is seen from itself on, others from the end of the sinks on."""
    index = torch.arange(sequences.length, device=sequences.device).expand_as(first)
    is_sink = sequences.sink_tokens(span)
    whole = run_starts(sequences.chunked(None))
    begin = torch.where(whole, index, 0).cummax(-1).values
    end = torch.where(is_sink, index + 1, 0).cummax(-1).values  # of the sinks up to here, in this row
    end = torch.where(end > begin, end, 0)  # of this sequence
    if not span.sees_sinks:
        other = ~is_sink if sequences.real is None else ~is_sink & sequences.real
        after = torch.where(other, index, sequences.length).flip(-1).cummin(-1).values.flip(-1)  # the next one, from here on
        last = torch.where(is_sink, torch.minimum(last, after), last)
    return torch.maximum(first, torch.where(is_sink, index, end)), last

