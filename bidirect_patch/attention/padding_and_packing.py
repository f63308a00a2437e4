"""Which positions of a batch are real, and which sequence each belongs to, read from the user's arguments.

A row may hold several sequences one behind the other ("packed"). The rules that every backend follows stand here: where a
sequence starts, what a window is, and what padding sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from ..errors import AttentionMaskError
from ..model.windows import Span
from ..swap.recording import values_are_unknown


def in_window(query: Any, key: Any, window: int) -> Any:
    """Whether positions `query` and `key` (tensors of one shape or broadcastable) are within a window."""
    return (query - key).abs() < window


def with_padding(seen: Any, real_query: Any, real_key: Any, any_real: Any) -> Any:
    """Who sees whom where some positions are padding, given who would see whom without.

    A real query sees real keys only. A padded query sees every real key, and in a row of padding alone everything sees
    everything, so that no softmax runs over nothing. All arguments are bool and broadcastable.
    """
    return ((seen | ~real_query) & real_key) | ~any_real


def past_sinks(is_sink: Tensor, sees_sinks: bool) -> Tensor:
    """Who may see whom as far as sink tokens go: a sink sees no later token, and others see the sinks if `sees_sinks`.

    Args:
        is_sink: bool (..., length).
        sees_sinks: whether tokens that are no sinks see the sinks.

    Returns:
        bool (..., query, key).
    """
    index = torch.arange(is_sink.shape[-1], device=is_sink.device)
    query, key = is_sink[..., :, None], is_sink[..., None, :]
    seen = ~query | (index[:, None] >= index[None, :])
    return seen if sees_sinks else seen & (query | ~key)


def starts(positions: Tensor, real: Tensor | None = None) -> Tensor:
    """Where a new sequence starts within a row: at a real token whose position isn't beyond that of the real token before.

    Positions that skip some numbers stay one sequence. The first real token of a row is not marked.

    Args:
        positions: (batch, length), int.
        real: (batch, length), bool; None: all real.

    Returns:
        (batch, length), bool.
    """
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    if real is None:
        before = index - 1
    else:
        before = torch.where(real, index, -1).cummax(-1).values.roll(1, -1)
        before = torch.where(index == 0, -1, before)
    falls = positions <= positions.gather(-1, before.clamp(min=0))
    falls = falls & (before >= 0)
    return falls if real is None else falls & real


def run_starts(numbers: Tensor) -> Tensor:
    """bool (batch, length): where a run of equal numbers begins; True in the first column."""
    is_first = torch.arange(numbers.shape[1], device=numbers.device) == 0
    return is_first | (numbers != numbers.roll(1, -1))  # no slices: torch.export would refuse a length of 2


def places(marked: Tensor, begins: Tensor) -> Tensor:
    """int64 (batch, length): the place of each marked position among those of its run, from 1 on; 0 for the others.

    Args:
        marked: (batch, length), bool.
        begins: (batch, length), bool, where a run begins; see `run_starts`.
    """
    count = marked.cumsum(-1)
    before = torch.where(begins, count - marked.to(count.dtype), 0).cummax(-1).values
    return torch.where(marked, count - before, 0)


@dataclass
class Sequences:
    """Which positions of a batch are real, and which sequence each belongs to."""

    batch: int
    length: int
    device: torch.device
    real: Tensor | None  # bool (batch, length); None: all
    number: Tensor | None  # int64 (batch, length), one more at each new sequence; None: one sequence per row

    def hide_nothing(self, spans: tuple[Span, ...]) -> bool:
        """Whether every position sees every other in layers of all these spans."""
        if self.real is not None or self.number is not None:
            return False
        if is_tracing():  # a trace also runs at other lengths
            return all(span.has_no_limit for span in spans)
        return not any(span.hides_within(self.length) for span in spans)

    def chunked(self, chunk: int | None) -> Tensor:
        """int64 (batch, length): the numbers of sequences, or of their chunks of `chunk` positions."""
        number = self.number
        if number is None:
            number = torch.zeros(self.batch, self.length, dtype=torch.int64, device=self.device)
        if chunk is None:
            return number
        index = torch.arange(self.length, device=self.device)
        return number * (self.length // chunk + 1) + (index - self._first_positions()).clamp(min=0) // chunk

    def sink_tokens(self, span: Span) -> Tensor:
        """bool (batch, length): the sink tokens of each sequence."""
        number = self.chunked(None)
        place = places(torch.ones_like(number, dtype=torch.bool) if self.real is None else self.real, run_starts(number))
        return (place > 0) & (place <= span.sinks)

    def visible(self, span: Span) -> Tensor:
        """bool (batch, query, key): who sees whom in a layer of this span."""
        number = self.chunked(span.chunk)
        seen = number[:, :, None] == number[:, None, :]
        if span.window is not None:
            index = torch.arange(self.length, device=self.device)
            seen = seen & in_window(index[:, None], index[None, :], span.window)
        if span.sinks:
            seen = seen & past_sinks(self.sink_tokens(span), span.sees_sinks)
        if self.real is None:
            return seen
        return with_padding(seen, self.real[:, :, None], self.real[:, None, :], self.real.any(-1)[:, None, None])

    def _first_positions(self) -> Tensor:
        """int64 (batch, length): where the position's sequence begins, after any left padding."""
        index = torch.arange(self.length, device=self.device).expand(self.batch, self.length)
        first = torch.zeros_like(index)
        if self.number is not None:
            first = torch.where(run_starts(self.number), index, 0).cummax(-1).values
        if self.real is not None:
            padding = (self.real.cumsum(-1) == 0).sum(-1, keepdim=True)
            first = torch.maximum(first, padding)
        return first


def read_sequences(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    batch: int,
    length: int,
    device: torch.device,
) -> Sequences:
    """The sequences that a user's arguments describe.

    Args:
        attention_mask: (batch, length), 1 where real and 0 where padding, of any dtype.
        position_ids: (batch, length) or (1, length), int; see `starts`.
        cu_seq_lens: (sequences + 1,), int: 0, then where each sequence of the one row ends.
        batch: rows.
        length: tokens per row.
        device: where the model's input is.

    Raises:
        AttentionMaskError: another shape, type or content.
    """
    real = None if attention_mask is None else _read_mask(attention_mask, batch, length, device)
    number = None
    text = None if position_ids is None else read_positions(position_ids, batch, length)
    if cu_seq_lens is not None:
        number = read_boundaries(cu_seq_lens, batch, length, device)
    elif text is not None:
        if length > 1:
            text = text.to(device).expand(batch, length)
            if values_are_unknown() or bool((torch.diff(text, dim=-1) != 1).any()):
                number = starts(text, real).cumsum(-1)
    return Sequences(batch, length, device, real, number)


def check_readable(name: str, given: Tensor, device: torch.device) -> None:
    """Raise AttentionMaskError if a tensor has no values that can be compared: complex, sparse, nested, on meta."""
    what = None
    if given.is_complex():
        what = f"dtype {given.dtype}"
    elif given.is_nested or given.layout is not torch.strided:
        what = "a nested layout" if given.is_nested else f"layout {given.layout}"
    elif given.is_meta and device.type != "meta":
        what = "the meta device, without values"
    if what is not None:
        raise AttentionMaskError(f"{name} of {what}: give a dense tensor of real numbers, on the model's device")


def _read_mask(mask: Any, batch: int, length: int, device: torch.device) -> Tensor | None:
    if not isinstance(mask, Tensor):
        raise AttentionMaskError(
            f"attention_mask must be a tensor or None, got {type(mask).__name__}: give ({batch}, {length}) with 1 for real "
            "tokens and 0 for padding"
        )
    check_readable("attention_mask", mask, device)
    if tuple(mask.shape) != (batch, length):
        raise AttentionMaskError(
            f"attention_mask of shape {tuple(mask.shape)} for input of {batch} x {length} tokens: give ({batch}, {length}) with "
            f"1 for real tokens and 0 for padding, or a ready 4D mask ({batch}, 1, {length}, {length}), or None"
        )
    mask = mask.to(device)
    real = mask.to(torch.bool)
    if values_are_unknown():
        return real
    is_binary = torch.ones((), dtype=torch.bool, device=device) if mask.dtype == torch.bool else (mask == real).all()
    is_binary, all_real = torch.stack([is_binary, real.all()]).tolist()
    if not is_binary:
        raise AttentionMaskError(
            "attention_mask holds other values than 1 (real) and 0 (padding). Numbers of packed sequences, such as 1 1 2 2, are "
            "not taken here: give 0 and 1, and position_ids that start again at 0 with each sequence. An additive mask is "
            f"given as a 4D mask ({batch}, 1, {length}, {length})"
        )
    return None if all_real else real


def read_positions(positions: Any, batch: int, length: int) -> Tensor | None:
    """The positions of the text, (batch or 1, length); None for those of other kinds of input.

    Raises:
        AttentionMaskError: another shape or type.
    """
    if not isinstance(positions, Tensor) or not _is_integer(positions):
        what = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise AttentionMaskError(
            f"position_ids must be a tensor of integers or None, got {what}: give ({batch}, {length}), counted from 0 in each "
            "sequence"
        )
    # (3 or 4, batch, length) are multimodal rotary positions; of these, only a group of four starts with text positions.
    text = positions[0] if positions.dim() == 3 and positions.shape[0] == 4 else positions
    if text.dim() == 1 and text.shape[0] == length:
        return text[None]
    if text.dim() == 3:
        return None
    if text.dim() != 2 or text.shape[0] not in (1, batch) or text.shape[1] != length:
        raise AttentionMaskError(
            f"position_ids of shape {tuple(positions.shape)} for input of {batch} x {length} tokens: give ({batch}, {length}) or "
            f"(1, {length})"
        )
    return text


def _is_integer(given: Tensor) -> bool:
    return not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)


def read_boundaries(boundaries: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """int64 (batch, length): the number of the sequence of each position, from 1 on.

    Raises:
        AttentionMaskError: another shape, type or content.
    """
    if not isinstance(boundaries, Tensor) or not _is_integer(boundaries) or boundaries.dim() != 1:
        what = f"{boundaries.dtype} {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else type(boundaries).__name__
        raise AttentionMaskError(
            f"cu_seq_lens_q must be a 1D tensor of integers, got {what}: give boundaries that rise from 0 to {length}"
        )
    boundaries = boundaries.to(device=device, dtype=torch.int64)
    if not values_are_unknown():
        ends = boundaries.tolist()
        if batch != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != length or any(a >= b for a, b in zip(ends, ends[1:])):
            raise AttentionMaskError(
                f"cu_seq_lens_q {ends} for input of {batch} x {length} tokens: give one row, and boundaries that rise from 0 to "
                f"{length}"
            )
    index = torch.arange(length, device=device)
    return torch.searchsorted(boundaries, index, right=True).expand(batch, length)
