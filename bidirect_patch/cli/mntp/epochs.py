"""How often the texts have been gone through, told by the data itself.

Masks depend on it. A worker process that lives on has a copy of the collator, and a batch may be prepared ahead, so that a
number kept beside the data would be that of another pass.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

PASS = "pass"  # the key of a sequence that says which pass over the texts it belongs to


class CountedSequences(Dataset[dict[str, Any]]):
    """A data set whose sequences say which pass they belong to, where they are asked for by pass and index.

    Args:
        sequences: The data set of `input_ids`.
    """

    def __init__(self, sequences: Any) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(key, tuple):
            return {**self.sequences[key[1]], PASS: key[0]}
        sequence: dict[str, Any] = self.sequences[key]
        return sequence


class CountingSampler(Sampler[tuple[int, int]]):
    """Yields the pass with each index. It runs in the main process, where the number of the pass is known.

    Args:
        order: The sampler of the indices.
        seed: An order that is drawn depends on this seed and the pass alone. So it is the same in all processes, and in a
            run that was resumed.
    """

    def __init__(self, order: Sampler[int], seed: int) -> None:
        self.order = order
        self.seed = seed
        self.number = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass. accelerate calls this before each pass."""
        self.number = epoch

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        number = self.number
        if hasattr(self.order, "generator"):
            self.order.generator = torch.Generator().manual_seed(self.seed + number)
        for index in self.order:
            yield number, index


class EndlessStream(IterableDataset[dict[str, Any]]):
    """A stream that starts over at its end.

    It is one epoch without an end, so that a resumed run finds every step again. A stream with nothing in it ends at once:
    so it is in a worker process for which no file is left.

    Args:
        sequences: The stream of `input_ids`.
    """

    def __init__(self, sequences: Any) -> None:
        self.sequences = sequences

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            sequence = None
            for sequence in self.sequences:
                yield {**sequence, PASS: number}
            if sequence is None:
                return
