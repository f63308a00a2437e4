"""From the user's mask to the bidirectional mask, in the form that each backend and era of transformers takes.

Two steps. `ready_mask` runs once per forward, in the model that would build the causal mask: it hands on a finished 4D
mask, before which transformers' own mask code steps aside. `attention_arguments` runs in each attention module: it
picks the mask of that module's reach. Everything travels as one forward argument, so that gradient checkpointing
replays it and threads don't share it.

For K distinct reaches `ready_mask` makes, and the attention module gets:

- eager, sdpa: (batch, K, query, key), additive or bool, stride 0 throughout if nothing is masked -> its own
  (batch, 1, query, key), or None for sdpa if nothing is masked;
- flex_attention: a BlockMask that carries one for each reach, or the stride-0 tensor -> its own BlockMask, or None;
- flash_attention_*: int32 (batch, K, 1, key), the document of each position and -1 for padding, or None if nothing is
  masked -> the 2D mask, or cu_seq_lens.

Visible means: the key is real, in the query's document, and within the layer's reach. A padded query sees every real
key, and in a row of padding alone everything sees everything, so that no softmax runs over nothing.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import __version__ as _transformers_version

from ..errors import AttentionMaskError
from ..model.find import Reach
from ..attention.packed_sdpa import PackedMask, documents_of

# What differs by era, in one place.
_VERSION = Version(_transformers_version)
_HAS_MASKING_UTILS = find_spec("transformers.masking_utils") is not None  # 4.53
ONES_AND_ZEROS = _VERSION < Version("4.42")  # mask code that takes a ready mask inverted it until then
FLASH_WINDOW_IS_INCLUSIVE = _VERSION < Version("4.56")  # window w reached distance w, not w-1
FLASH_WINDOWS_LAYERS_FROM = 0 if _VERSION >= Version("4.43") else 1 << 30  # the max_window_layers that gives each a window


def backend_of(config: Any) -> str:
    """ "flash", "flex", "sdpa" or "eager" (which stands for any other function that takes an additive mask)."""
    name = str(getattr(config, "_attn_implementation", None) or "eager")
    return next((kind for kind in ("flash", "flex", "sdpa") if kind in name), "eager")


def _sdpa_honours_flag() -> bool:
    """Whether SDPA without a mask sees everything when the module isn't causal, found by running transformers' function."""
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return False
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 1
    query = torch.zeros(1, 1, 2, 1)
    value = torch.tensor([[[[0.0], [1.0]]]])
    out, _ = sdpa_attention_forward(module, query, query, value, None)
    return bool(out[0, 0, 0, 0] == 0.5)  # 0.0 if the first position can't see the second


# Backends that see everything when a non-causal module hands them no mask.
WITHOUT_MASK = ("flex", "sdpa") if _sdpa_honours_flag() else ("flex",)


def _flex_takes_block_mask() -> bool:  # 4.50
    try:
        from transformers.integrations import flex_attention
    except ImportError:
        return False
    return hasattr(flex_attention, "BlockMask")


_BLOCK_MASK = _flex_takes_block_mask()


def _compiling() -> bool:
    return torch.compiler.is_compiling()


@dataclass
class Layout:
    """Which positions of a batch are real and which document each belongs to; None: all real, one document a row."""

    batch: int
    length: int
    device: torch.device
    real: Tensor | None  # bool (batch, length)
    document: Tensor | None  # int64 (batch, length), rising by one at each new document

    @property
    def plain(self) -> bool:
        """Nothing is padded and nothing is packed."""
        return self.real is None and self.document is None

    def leads(self) -> Tensor:
        """int64 (batch, length): position of each document's first token, past any left padding."""
        index = torch.arange(self.length, device=self.device).expand(self.batch, self.length)
        lead = torch.zeros_like(index)
        if self.document is not None:
            first = self.document != torch.roll(self.document, 1, -1)
            lead = torch.where(first, index, 0).cummax(-1).values
        if self.real is not None:
            padding = (self.real.cumsum(-1) == 0).sum(-1, keepdim=True)
            lead = torch.maximum(lead, padding)
        return lead

    def chunked(self, chunk: int | None) -> Tensor:
        """int64 (batch, length): like `document`, with each document cut into chunks of `chunk` positions."""
        document = self.document if self.document is not None else self._zeros()
        if chunk is None:
            return document
        lead = self.leads()
        index = torch.arange(self.length, device=self.device)
        part = (index - lead).clamp(min=0) // chunk
        return document * (self.length // chunk + 1) + part

    def _zeros(self) -> Tensor:
        return torch.zeros(self.batch, self.length, dtype=torch.int64, device=self.device)

    def visible(self, reach: Reach) -> Tensor:
        """bool (batch, query, key)."""
        document = self.chunked(reach.chunk)
        seen = document[:, :, None] == document[:, None, :]
        if reach.window is not None:
            index = torch.arange(self.length, device=self.device)
            seen = seen & ((index[:, None] - index[None, :]).abs() < reach.window)
        if self.real is not None:
            seen = (seen | ~self.real[:, :, None]) & self.real[:, None, :]
            seen = seen | ~self.real.any(-1)[:, None, None]
        return seen

    def bites(self, reach: Reach) -> bool:
        """Whether a row is long enough for this reach to hide anything."""
        limits = [n for n in reach if n is not None]
        return any(n < self.length for n in limits)


def read_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    batch: int,
    length: int,
    device: torch.device,
) -> Layout:
    """The layout that a user's arguments describe.

    attention_mask: (batch, length), nonzero where real. position_ids: (batch, length) or (1, length), int; a document
    starts wherever they don't rise from one real token to the next. cu_seq_lens: (documents + 1,), int.
    Raises AttentionMaskError on any other shape.
    """
    real = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or tuple(attention_mask.shape) != (batch, length):
            raise AttentionMaskError(
                f"attention_mask of shape {tuple(attention_mask.shape)} for input of {batch} x {length} tokens: give "
                f"({batch}, {length}) with 1 for real tokens and 0 for padding, or a ready 4D mask "
                f"({batch}, 1, {length}, {length}), or None"
            )
        real = attention_mask.to(device=device, dtype=torch.bool)
        if not _compiling() and bool(real.all()):  # reading values would break a compiled graph
            real = None
    document = None
    if cu_seq_lens is not None:
        index = torch.arange(length, device=device)
        document = torch.searchsorted(cu_seq_lens.to(device=device, dtype=index.dtype), index, right=True)
        document = document.expand(batch, length)
    elif position_ids is not None:
        # (3 or 4, batch, length) are multimodal rotary positions; only the fourth form starts with text positions
        text = position_ids[0] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids
        if text.dim() == 2 and (text.shape[0] not in (1, batch) or text.shape[1] != length):
            raise AttentionMaskError(
                f"position_ids of shape {tuple(text.shape)} for input of {batch} x {length} tokens: give ({batch}, {length}) "
                f"or (1, {length})"
            )
        if text.dim() == 2 and length > 1:
            text = text.to(device).expand(batch, length)
            if _compiling() or bool((torch.diff(text, dim=-1) != 1).any()):
                document = _restarts(text, real).cumsum(-1)
    return Layout(batch, length, device, real, document)


def _restarts(positions: Tensor, real: Tensor | None) -> Tensor:
    """bool (batch, length): a real token whose position isn't beyond that of the real token before it."""
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    if real is None:
        before = index - 1
    else:
        before = torch.where(real, index, -1).cummax(-1).values.roll(1, -1)
        before[:, 0] = -1
    falls = positions <= positions.gather(-1, before.clamp(min=0))
    falls = falls & (before >= 0)
    return falls if real is None else falls & real


def ready_mask(
    layout: Layout, reaches: tuple[Reach, ...], backend: str, dtype: torch.dtype, ones_and_zeros: bool = False
) -> Any:
    """The 4D mask that a model's own mask code passes on as it is; the table above says what it holds.

    ones_and_zeros: instead of the additive form (0 and the dtype's minimum).
    """
    nothing = layout.plain and not any(layout.bites(r) for r in reaches)
    if backend == "flash":
        return None if nothing else _documents(layout, reaches)
    if backend == "flex" and _BLOCK_MASK:
        if not (nothing and _HAS_MASKING_UTILS):  # before 4.53 a tensor was taken for a 2D mask there
            return _block_masks(layout, reaches)
    shape = (layout.batch, len(reaches), layout.length, layout.length)
    as_bool = backend in ("sdpa", "flex") and _HAS_MASKING_UTILS and not ones_and_zeros
    if nothing:
        if as_bool:
            return torch.ones((), dtype=torch.bool, device=layout.device).expand(shape)
        fill = 1.0 if ones_and_zeros else 0.0
        return torch.full((), fill, dtype=dtype, device=layout.device).expand(shape)
    seen = (
        torch.stack([layout.visible(r) for r in reaches], 1)
        if len(reaches) > 1
        else layout.visible(reaches[0])[:, None]
    )
    if as_bool:
        mask = seen
    elif ones_and_zeros:
        mask = seen.to(dtype)
    else:
        mask = torch.where(seen, torch.zeros((), dtype=dtype, device=layout.device), torch.finfo(dtype).min)
    if backend == "sdpa" and layout.document is not None and layout.real is None and not _compiling():
        # An attribute: a mask that is copied on its way, in a checkpoint's replay say, loses speed at most.
        mask._bidirect_patch_documents = [documents_of(layout.chunked(r.chunk), r.window) for r in reaches]  # type: ignore[attr-defined]
    return mask


def _documents(layout: Layout, reaches: tuple[Reach, ...]) -> Tensor:
    # Numbered from 0, so that a zero is in it: older models drop a mask without one.
    rows = []
    if layout.real is not None and any(r.window is not None and r.window < layout.length for r in reaches):
        ends = layout.real[:, :-1] & ~layout.real[:, 1:]
        if bool((ends.sum(-1) + layout.real[:, -1] > 1).any()) and layout.document is None:
            raise AttentionMaskError(
                "attention_mask has padding in the middle of a row and the model a sliding window, which FlashAttention would "
                "count in real tokens: put padding at an end, or use attn_implementation='sdpa'"
            )
    for reach in reaches:
        document = layout.chunked(reach.chunk)
        first = document != torch.roll(document, 1, -1)
        first[:, 0] = False
        document = first.cumsum(-1)
        rows.append(document if layout.real is None else document.masked_fill(~layout.real, -1))
    return torch.stack(rows, 1)[:, :, None].to(torch.int32)


def _block_masks(layout: Layout, reaches: tuple[Reach, ...]) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def block_mask(reach: Reach) -> Any:
        document = layout.chunked(reach.chunk)
        real = layout.real if layout.real is not None else torch.ones_like(document, dtype=torch.bool)
        any_real = real.any(-1)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = document[b, q] == document[b, k]
            if reach.window is not None:
                seen = seen & ((q - k).abs() < reach.window)
            return ((seen | ~real[b, q]) & real[b, k]) | ~any_real[b]

        return create_block_mask(visible, layout.batch, None, layout.length, layout.length, device=layout.device)

    masks = [block_mask(r) for r in reaches]
    masks[0].by_reach = masks  # a BlockMask can't be sliced by reach, so the first carries its siblings
    return masks[0]


def pick(mask: Any, index: int, count: int, may_drop: bool) -> Any:
    """This module's mask (batch, 1, query, key) or BlockMask out of what `ready_mask` made.

    index, count: which of how many reaches. may_drop: None means "sees everything" to this module, so that a mask
    that hides nothing can be left out and the fastest kernel taken.
    """
    if not isinstance(mask, Tensor):
        return getattr(mask, "by_reach", [mask] * count)[index]
    if mask.dim() != 4:
        return mask
    documents = getattr(mask, "_bidirect_patch_documents", [None] * count)[index]
    if count > 1 and mask.shape[1] == count:
        mask = mask[:, index : index + 1]
    if may_drop and not any(mask.stride()):
        return None
    return mask if documents is None else PackedMask.of(mask, documents)


@dataclass
class FlashPlan:
    """How FlashAttention runs over one batch: by a 2D mask if rows are only padded, by cu_seq_lens if packed."""

    mask: Tensor | None  # int32 (batch, length), 0 for padding
    cu_seq_lens: Tensor | None = None  # int32 (sequences + 1,), over the flattened batch; a run of padding is one too
    max_length: int = 0
    positions: Tensor | None = None  # int64 (batch, length), restarting at 0 with each sequence


def flash_plan(documents: Tensor) -> FlashPlan:
    """The plan for documents (batch, length), int, -1 for padding. Raises AttentionMaskError on a torn document."""
    if int(documents.max()) <= 0:
        return FlashPlan((documents >= 0).to(torch.int32))
    batch, length = documents.shape
    first = documents != torch.roll(documents, 1, -1)
    first[:, 0] = True
    if int((first & (documents >= 0)).sum()) != int(sum(len(torch.unique(row[row >= 0])) for row in documents)):
        raise AttentionMaskError(
            "attention_mask has padding in the middle of a packed document, which FlashAttention can't skip: "
            "put padding between documents, or use attn_implementation='sdpa'"
        )
    starts = first.flatten().nonzero().flatten().to(torch.int32)
    cu = torch.nn.functional.pad(starts, (0, 1), value=batch * length)
    index = torch.arange(length, device=documents.device).expand(batch, length)
    positions = index - torch.where(first, index, 0).cummax(-1).values
    return FlashPlan(None, cu, int(torch.diff(cu).max()), positions)
