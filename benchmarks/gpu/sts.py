"""Spearman's correlation of cosines with people's scores, for a decoder and tokenized pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.carried import load_scores, load_texts
from benchmarks.ladder.encode import batches_by_length, pooling_weights
from bidirect_patch.cli.spearman import spearman

POOLINGS = ("mean", "weighted mean")
BATCH_TOKENS = 16_384


def padded(texts: Sequence[np.ndarray], pad: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """One batch padded on the right, cut after `length` tokens.

    Returns:
        `input_ids` and `attention_mask`, (texts, longest), int64, on the device.
    """
    cut = [torch.from_numpy(text[:length]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in cut])
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(texts, width), float32: the mean over real tokens; weighted, the i-th of them counts i times."""
    return (hidden.float() * pooling_weights(mask.float(), pooling)[..., None]).sum(1)


@torch.no_grad()
def embed(decoder: Any, texts: Sequence[np.ndarray], pad: int, device: torch.device) -> dict[str, Tensor]:
    """The embeddings of the texts by pooling, each (texts, width), float32, on the CPU."""
    found: dict[str, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    order: list[int] = []
    for chosen in batches_by_length([len(text) for text in texts], BATCH_TOKENS):
        order += chosen
        batch = padded([texts[i] for i in chosen], pad, 10**6, device)
        hidden = decoder(**batch, use_cache=False).last_hidden_state
        for pooling in POOLINGS:
            found[pooling].append(pooled(hidden, batch["attention_mask"], pooling).cpu())
    back = torch.tensor(order).argsort()
    return {pooling: torch.cat(rows)[back] for pooling, rows in found.items()}


def evaluate(decoder: Any, folder: Path, pad: int, device: torch.device) -> dict[str, dict[str, float]]:
    """100 times Spearman's correlation, by pooling and by the name of the set (a file sts-NAME.npz)."""
    was_training = decoder.training
    decoder.eval()
    found: dict[str, dict[str, float]] = {pooling: {} for pooling in POOLINGS}
    for file in sorted(folder.glob("sts-*.npz")):
        scores = load_scores(file)
        vectors = embed(decoder, load_texts(file), pad, device)
        for pooling in POOLINGS:
            one, other = vectors[pooling].split(len(scores))
            cosines = torch.cosine_similarity(one, other).numpy()
            found[pooling][file.stem.removeprefix("sts-")] = 100 * spearman(cosines, scores)
    decoder.train(was_training)
    return found
