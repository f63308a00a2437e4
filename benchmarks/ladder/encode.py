"""Embeddings of many texts under each pooling and from several layers, out of one pass."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.ladder.texts import Pairs

POOLINGS = ("mean", "weighted mean", "mean without the first token", "last token")
BATCH_TOKENS = 2048


class Way(NamedTuple):
    """How token vectors become an embedding."""

    layer: int  # this many layers, then the final norm
    pooling: str
    centred: bool  # minus the mean embedding of sentences that were trained on

    def __str__(self) -> str:
        return f"{self.pooling}, {self.layer} layers{', centred' if self.centred else ''}"


def pooling_weights(mask: Tensor, pooling: str) -> Tensor:
    """How much each token counts.

    Args:
        mask: (texts, length), float32: 1 for the tokens to pool, on the left, 0 for padding.
        pooling: One of POOLINGS.

    Returns:
        (texts, length), float32; each row's sum is 1.
    """
    position = mask.cumsum(-1) * mask
    weights = {
        "mean": mask,
        "weighted mean": position,
        "mean without the first token": mask * (position != 1) + mask * (mask.sum(-1, keepdim=True) == 1),
        "last token": (position == mask.sum(-1, keepdim=True)).float() * mask,
    }[pooling]
    return weights / weights.sum(-1, keepdim=True)


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The indices of all texts, the shortest first, in batches of at most so many tokens with padding, or of one text."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    begin = 0
    while begin < len(order):
        count = 1
        while begin + count < len(order) and (count + 1) * lengths[order[begin + count]] <= tokens:
            count += 1
        yield order[begin : begin + count]
        begin += count


@torch.no_grad()
def embed(
    decoder: Any, tokenizer: Any, texts: Sequence[str], layers: Sequence[int], echo: bool = False
) -> dict[tuple[int, str], np.ndarray]:
    """Embeddings by layer and pooling, (texts, width), float32.

    Args:
        decoder: The bare decoder, in eval mode.
        tokenizer: Its tokenizer.
        texts: What is embedded.
        layers: After how many layers.
        echo: Read each text twice and pool its second time.
    """
    ids = [tokenizer(f"{text} {text}" if echo else text)["input_ids"] for text in texts]
    skipped = [len(tokenizer(text)["input_ids"]) if echo else 0 for text in texts]
    found: dict[tuple[int, str], list[Tensor]] = {}
    order: list[int] = []
    for chosen in batches_by_length([len(row) for row in ids], BATCH_TOKENS):
        order += chosen
        for key, vectors in _embed_batch(decoder, ids, skipped, chosen, layers).items():
            found.setdefault(key, []).append(vectors)
    back = torch.tensor(order).argsort()
    return {key: torch.cat(rows)[back].numpy() for key, rows in found.items()}


def _embed_batch(
    decoder: Any, ids: list[list[int]], skipped: list[int], chosen: list[int], layers: Sequence[int]
) -> dict[tuple[int, str], Tensor]:
    rows = [torch.tensor(ids[i]) for i in chosen]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    at = torch.arange(padded.shape[1])
    mask = at < torch.tensor([[len(row)] for row in rows])
    pooled = (mask & (at >= torch.tensor([[skipped[i]] for i in chosen]))).float()
    out = decoder(
        input_ids=padded.to(decoder.device),
        attention_mask=mask.long().to(decoder.device),
        use_cache=False,
        output_hidden_states=True,
    )
    last = len(out.hidden_states) - 1
    found = {}
    for layer in layers:
        hidden = out.last_hidden_state if layer == last else decoder.norm(out.hidden_states[layer])
        for pooling in POOLINGS:
            weights = pooling_weights(pooled, pooling).to(hidden.device)
            found[layer, pooling] = (hidden.float() * weights[..., None]).sum(1).cpu()
    return found


def centres(
    decoder: Any, tokenizer: Any, sentences: Sequence[str], layers: Sequence[int], echo: bool = False
) -> dict[tuple[int, str], np.ndarray]:
    """The mean embedding of sentences by layer and pooling, (width,), float32; the arguments are those of `embed`."""
    return {key: rows.mean(0) for key, rows in embed(decoder, tokenizer, sentences, layers, echo).items()}


def cosines(
    decoder: Any, tokenizer: Any, pairs: Pairs, centre: Mapping[tuple[int, str], np.ndarray], echo: bool = False
) -> dict[Way, np.ndarray]:
    """The cosine of each pair in every way, (pairs,), float64.

    Args:
        decoder: The bare decoder, in eval mode.
        tokenizer: Its tokenizer.
        pairs: The pairs.
        centre: What `centres` gives; its layers are those that are pooled.
        echo: Read each text twice and pool its second time.
    """
    unique = sorted({*pairs.first, *pairs.second})
    where = {text: i for i, text in enumerate(unique)}
    vectors = embed(decoder, tokenizer, unique, sorted({layer for layer, _ in centre}), echo)
    first, second = ([where[text] for text in side] for side in (pairs.first, pairs.second))
    found = {}
    for (layer, pooling), rows in vectors.items():
        for centred in (False, True):
            x = (rows - centre[layer, pooling] * centred).astype(np.float64)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            found[Way(layer, pooling, centred)] = (x[first] * x[second]).sum(1)
    return found
