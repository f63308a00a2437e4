"""Embeddings of texts after each depth and under each pooling, out of few forwards."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...encoder.pooled import without_sinks
from .parts import Parts
from .passes import Depth, states
from .setups import Attention, Pooling, poolings
from .texts import batches


def pooling_weights(mask: Tensor, pooling: Pooling) -> Tensor:
    """How much each token counts. A text of one token is pooled with it in any case.

    Args:
        mask: (texts, length), int64: 1 for a token, 0 for padding on the right.
        pooling: The pooling.

    Returns:
        (texts, length), float32; each row's sum is 1.
    """
    pooled = mask if pooling.with_first else without_sinks(mask, 1)
    weights = (pooled.cumsum(1) * pooled if pooling.mode == "weighted_mean" else pooled).float()
    return weights / weights.sum(1, keepdim=True)


class Embeddings:
    """Embeddings of texts under one attention, with one first token. Texts can be added later.

    Args:
        parts: The model.
        family: The attention.
        ids: The tokens of each text.
        token: What stands before each text; None for the tokenizer as it is.
        depths: After how many layers, of which how many are blind.
    """

    def __init__(
        self, parts: Parts, family: Attention, ids: Sequence[Sequence[int]], token: str | None, depths: Iterable[Depth]
    ) -> None:
        self.parts, self.family, self.ids, self.token = parts, family, ids, token
        self.depths = sorted(depths)
        self.poolings = poolings(family)
        self._found: dict[Depth, np.ndarray] = {}
        self._is_there = np.zeros(len(ids), dtype=bool)

    def of(self, depth: Depth) -> np.ndarray:
        """(poolings, texts, width), float32; any numbers for texts that were not encoded."""
        return self._found[depth]

    def lacking(self, texts: np.ndarray) -> np.ndarray:
        """Those of some texts, by their indices, that were not encoded yet."""
        lacking: np.ndarray = texts[~self._is_there[texts]]
        return lacking

    def keep(self, depths: Iterable[Depth]) -> None:
        """Look at some of the depths alone from now on, and forget the embeddings at the others."""
        self.depths = sorted(depths)
        self._found = {depth: found for depth, found in self._found.items() if depth in self.depths}

    @torch.no_grad()
    def add(self, texts: np.ndarray, progress: Callable[[int], object]) -> None:
        """Encode the texts that were not encoded yet.

        Args:
            texts: Their indices, (texts,).
            progress: Is told how many more texts were encoded.

        Raises:
            UnsupportedModelError: The model cannot have this attention.
        """
        device = next(self.parts.model.parameters()).device
        for batch, ids, mask in batches(self.ids, self.lacking(texts).tolist()):
            weights = torch.stack([pooling_weights(mask, pooling) for pooling in self.poolings], 1).to(device)
            ids, mask = ids.to(device), mask.to(device)
            for depth, state in self.states(ids, mask):
                # What stands at padding may be no number.
                kept = state.float().masked_fill(mask[..., None] == 0, 0)
                self._put(depth, batch, (weights @ kept).cpu().numpy())
            self._is_there[batch] = True
            progress(len(batch))

    def states(self, ids: Tensor, mask: Tensor) -> Iterator[tuple[Depth, Tensor]]:
        """The states of a batch at each depth, as `passes.states` gives them."""
        return states(self.parts, self.family, self.depths, ids, mask)

    def _put(self, depth: Depth, batch: list[int], rows: np.ndarray) -> None:
        """Keep embeddings (texts, poolings, width)."""
        if depth not in self._found:
            shape = (rows.shape[1], len(self.ids), rows.shape[2])
            self._found[depth] = np.empty(shape, dtype=np.float32)  # rows that are not written take no memory
        self._found[depth][:, batch] = rows.swapaxes(0, 1)
