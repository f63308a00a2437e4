"""SDPA over a packed row, document by document.

On a CPU, SDPA over one row of many documents computes every pair of positions, and a mask throws most of them away. So
the mask of a packed row carries the documents' lengths to the one call that can use them. To everything else that a
model does with it, it is the plain mask.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# What one more call of SDPA costs, in pairs of positions: forward and backward on a CPU, heads of 64, as measured.
PAIRS_PER_CALL = 2048


class Documents(NamedTuple):
    """The documents of a packed row, one behind the other."""

    lengths: list[int]
    bands: dict[int, Tensor | None]  # by length: bool (length, length), what its window leaves visible; None: everything


def documents_of(numbers: Tensor, window: int | None) -> Documents | None:
    """The documents of a row, where running each alone is the faster way; else None.

    numbers: int (batch, length), which document each position belongs to. window: |q-k| < window within each.
    """
    if numbers.shape[0] != 1 or numbers.device.type != "cpu":  # on a GPU a call costs more, and FlashAttention has varlen
        return None
    lengths = [len(list(run)) for _, run in groupby(numbers[0].tolist())]
    saved = sum(lengths) ** 2 - sum(n * n for n in lengths)
    if saved <= PAIRS_PER_CALL * len(lengths):
        return None
    return Documents(lengths, {n: _band(n, window) for n in set(lengths)})


def _band(length: int, window: int | None) -> Tensor | None:
    if window is None or length <= window:
        return None
    index = torch.arange(length)
    return (index[:, None] - index[None, :]).abs() < window


class PackedMask(Tensor):
    """A mask (1, 1, length, length) with which SDPA runs once for each document."""

    documents: Documents

    @classmethod
    def of(cls, mask: Tensor, documents: Documents) -> "PackedMask":
        packed = mask.as_subclass(cls)
        packed.documents = documents
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
        return cls.of(out, args[0].documents) if whole else out


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """query, key, value: (1, heads, length, dim). A call of another shape is the plain one."""
    rows = (query, key, value)
    if not isinstance(attn_mask, PackedMask) or any(
        x.dim() != 4 or x.shape[0] != 1 or x.shape[2] != attn_mask.shape[-1] for x in rows
    ):
        return scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    lengths, bands = attn_mask.documents
    parts = zip(*(x.split(lengths, dim=2) for x in rows))
    return torch.cat([scaled_dot_product_attention(q, k, v, bands[q.shape[2]], *args, **kwargs) for q, k, v in parts], 2)
