"""FlashAttention: a 2D mask for padding, or boundaries (cu_seq_lens) for packed rows. How long a window is: `plan`, `versions`.

What travels from the model to its attention modules are the numbers of sequences, int32 (batch, spans, 2, length): in the first
row the number, -1 for padding; in the second one the place of a sink token among those of its sequence or chunk, else 0.
`how_to_run` makes of one span's numbers what a module is called with.

No mask tells sink tokens from others here. So a module's own forward runs a second time on them alone (`SinkRows`). Where the
other tokens don't see the sinks, the sinks of a sequence are a sequence of their own.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import AttentionMaskError
from ..model.windows import Span
from ..swap.recording import is_graph_captured
from .padding_and_packing import Sequences, places, run_starts


def sequence_numbers(sequences: Sequences, spans: tuple[Span, ...]) -> Tensor | None:
    """int32 (batch, spans, 2, length), or None where nothing is hidden but from sinks.

    Raises:
        AttentionMaskError: padding in the middle of a sequence beside a window, which FlashAttention counts in real tokens.
    """
    limits = tuple(span._replace(sinks=0) if span.sees_sinks else span for span in spans)
    if sequences.hide_nothing(limits):
        return None
    real = sequences.real
    if real is not None and sequences.number is None and any(span.hides_within(sequences.length) for span in limits):
        ends = real[:, :-1] & ~real[:, 1:]
        windowed = any(span.window is not None for span in spans)
        if windowed and bool((ends.sum(-1) + real[:, -1] > 1).any()):
            raise AttentionMaskError(
                "attention_mask has padding in the middle of a row and the model a sliding window, which FlashAttention would "
                "count in real tokens: put padding at an end, or use attn_implementation='sdpa'"
            )
    rows = []
    for span in spans:
        number = sequences.chunked(span.chunk)
        begins = run_starts(number)
        ranks = places(sequences.sink_tokens(span), begins)
        if not span.sees_sinks:
            begins = begins | run_starts(ranks > 0)
        number = begins.cumsum(-1) - 1  # from 0 on in each row: older models drop a mask that holds no 0
        number = number if real is None else number.masked_fill(~real, -1)
        rows.append(torch.stack([number, ranks], 1))
    return torch.stack(rows, 1).to(torch.int32)


def are_sequence_numbers(mask: object) -> bool:
    """Whether a mask is what `sequence_numbers` made."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 2 and mask.dtype == torch.int32


SinkRows = list[Tensor]
"""int64 (sequences, i + 1) for the i-th sink: where it and those before it are in the batch, all rows one behind the other.

Run over each row alone, without a mask, attention gives the i-th sink in the last place what causal attention gives it.
"""


@dataclass(frozen=True)
class FlashCall:
    """How FlashAttention runs over one batch: by a 2D mask if rows are only padded, by boundaries if they are packed."""

    mask: Tensor | None  # int32 (batch, length), 0 for padding
    cu_seq_lens: Tensor | None = None  # int32 (sequences + 1,), over the rows one behind the other; padding is one too
    max_length: int = 0  # tokens of the longest sequence
    positions: Tensor | None = None  # int64 (batch, length), from 0 in each sequence
    sinks: SinkRows = field(default_factory=list)  # the sinks that have to be run alone


_calls: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the layers of one forward share a tensor of numbers


def how_to_run(numbers: Tensor, span: int) -> FlashCall:
    """How a layer of the span with this index runs. Worked out once per tensor of numbers (batch, spans, 2, length)."""
    if is_graph_captured():
        return _call(numbers[:, span])
    if numbers not in _calls:
        _calls[numbers] = [_call(numbers[:, i]) for i in range(numbers.shape[1])]
    return _calls[numbers][span]


def first_tokens(batch: int, length: int, count: int, device: torch.device) -> SinkRows:
    """The sinks of rows that are neither padded nor packed."""
    begins = torch.arange(batch, device=device)[:, None] * length
    return [begins + torch.arange(i + 1, device=device) for i in range(min(count, length))]


def _call(rows: Tensor) -> FlashCall:
    numbers, ranks = rows.unbind(1)
    sinks = _sink_rows(ranks)
    if int(numbers.max()) <= 0:
        return FlashCall((numbers >= 0).to(torch.int32), sinks=sinks)
    batch, length = numbers.shape
    first = run_starts(numbers)
    if int((first & (numbers >= 0)).sum()) != sum(len(torch.unique(row[row >= 0])) for row in numbers):
        raise AttentionMaskError(
            "attention_mask has padding in the middle of a packed sequence, or of a row in a sinkless layer, which "
            "FlashAttention can't skip: put padding between sequences, or use attn_implementation='sdpa'"
        )
    begins = first.flatten().nonzero().flatten().to(torch.int32)
    boundaries = pad(begins, (0, 1), value=batch * length)
    index = torch.arange(length, device=numbers.device).expand(batch, length)
    positions = index - torch.where(first, index, 0).cummax(-1).values
    return FlashCall(None, boundaries, int(torch.diff(boundaries).max()), positions, sinks)


def _sink_rows(ranks: Tensor) -> SinkRows:
    flat = ranks.flatten()
    places = flat.nonzero().flatten()  # the sinks of a sequence stand one behind the other
    order = flat[places]
    rows = []
    for i in range(int(order.max()) if len(order) else 0):
        last = (order == i + 1).nonzero().flatten()
        rows.append(places[last[:, None] + torch.arange(-i, 1, device=ranks.device)])
    return rows
