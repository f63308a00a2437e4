"""The quality of the encoder that is trained: Spearman's correlation on pairs of sentences with scores."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from ...encoder.pooled import without_sinks
from ...errors import ConfigError
from ...mntp.collator import IGNORED
from ...mntp.tokens import pad_token_id
from ..pairs import PAIR_COLUMNS
from ..spearman import spearman
from .data import LONGEST
from .settings import PoolingMode


class SentencePairs:
    """Pairs of sentences as token ids, with the scores that people gave them.

    Args:
        pairs: A data set with the columns `sentence1`, `sentence2` and `score`.
        tokenizer: Tokenizes as it does by default, with its special tokens.
        limit: The number of positions that the model has, if it has such a limit. A sentence is cut there, at the
            tokenizer's own limit, or at 1024 tokens.
        pooling: "mean", or "weighted_mean", where the n-th token has the weight n.
        num_sink_tokens: How many tokens at the start of a sentence are not pooled. A sentence of no others keeps its last one.

    Raises:
        ConfigError: The tokenizer makes no token of a sentence.
    """

    def __init__(self, pairs: Any, tokenizer: Any, limit: int | None, pooling: PoolingMode, num_sink_tokens: int = 0) -> None:
        self.scores = np.asarray(pairs["score"], dtype=np.float64)
        texts = [text for name in PAIR_COLUMNS[:2] for text in pairs[name]]
        length = min(LONGEST, tokenizer.model_max_length, limit or LONGEST)
        self.sentences = _token_ids(tokenizer, texts, length)
        self.pad_id = pad_token_id(tokenizer)
        self.pooling = pooling
        self.num_sink_tokens = num_sink_tokens
        empty = next((i for i, ids in enumerate(self.sentences) if not ids), None)
        if empty is not None:
            raise ConfigError(f"eval_sts: the tokenizer makes no token of {texts[empty]!r}, row {empty % len(pairs) + 1}")

    def spearman(self, model: Any, backbone: Any, batch_size: int) -> float:
        """Spearman's correlation of the scores with the cosines of the sentences' embeddings.

        Args:
            model: A model with an MNTP head, in evaluation mode. All of it is called, since autocast and FSDP are around the
                whole; the head has nothing to score.
            backbone: The part of it whose output is pooled.
            batch_size: Sentences at a time.

        Returns:
            The correlation; NaN where an embedding is no number or all cosines are equal.
        """
        embeddings: list[Tensor] = [torch.empty(0)] * len(self.sentences)
        order = sorted(range(len(self.sentences)), key=lambda i: -len(self.sentences[i]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = [torch.tensor(self.sentences[i]) for i in part]
            for i, embedding in zip(part, self._embed(model, backbone, ids)):
                embeddings[i] = embedding
        one, two = torch.stack(embeddings).double().chunk(2)
        return spearman(cosine_similarity(one, two).numpy(), self.scores)

    def _embed(self, model: Any, backbone: Any, ids: list[Tensor]) -> Tensor:
        """Token ids of some sentences, each (length,) -> (sentences, width), float32, on the CPU."""
        device = next(model.parameters()).device
        tokens = pad_sequence(ids, batch_first=True, padding_value=self.pad_id).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
        outputs: list[Any] = []
        hook = backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        try:
            with torch.no_grad():
                nothing = torch.full_like(tokens, IGNORED)
                model(input_ids=tokens, attention_mask=mask, labels=nothing, skip_logits=True)
        finally:
            hook.remove()
        return pool(outputs[0], without_sinks(mask, self.num_sink_tokens), self.pooling).cpu()


def pool(hidden: Tensor, mask: Tensor, pooling: PoolingMode) -> Tensor:
    """Pool token vectors.

    Args:
        hidden: (batch, length, width), of any floating dtype.
        mask: (batch, length), int64, 1 for a token to pool and 0 for another one or padding.
        pooling: "mean", or "weighted_mean", where the n-th of these tokens has the weight n.

    Returns:
        (batch, width), float32.
    """
    weights = (mask.cumsum(1) * mask if pooling == "weighted_mean" else mask).float()[..., None]
    kept = hidden.float().masked_fill(mask[..., None] == 0, 0)  # what stands at padding may be no number
    return (kept * weights).sum(1) / weights.sum(1)


def _token_ids(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    tokenizer = deepcopy(tokenizer)  # a fast tokenizer keeps the length of its last call, and it is saved with the model
    options = {"return_attention_mask": False, "verbose": False, "truncation": True, "max_length": length}
    ids: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return ids
