"""Spearman's correlation of cosines with people's scores, for a decoder and tokenized pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.carried import load_scores, load_texts

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
    weights = mask.float()
    if pooling == "weighted mean":
        weights = weights * weights.cumsum(-1)
    return (hidden.float() * weights[..., None]).sum(1) / weights.sum(-1, keepdim=True)


@torch.no_grad()
def embed(decoder: Any, texts: Sequence[np.ndarray], pad: int, device: torch.device) -> dict[str, Tensor]:
    """The embeddings of the texts by pooling, each (texts, width), float32, on the CPU."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[str, list[Tensor]] = {pooling: [] for pooling in POOLINGS}
    begin = 0
    while begin < len(order):
        count = 1
        while begin + count < len(order) and (count + 1) * len(texts[order[begin + count]]) <= BATCH_TOKENS:
            count += 1
        batch = padded([texts[i] for i in order[begin : begin + count]], pad, 10**6, device)
        hidden = decoder(**batch, use_cache=False).last_hidden_state
        for pooling in POOLINGS:
            found[pooling].append(pooled(hidden, batch["attention_mask"], pooling).cpu())
        begin += count
    back = torch.tensor(order).argsort()
    return {pooling: torch.cat(rows)[back] for pooling, rows in found.items()}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays of one length; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


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
