"""The module of a SentenceTransformer by which its pooling leaves sinks out. It needs sentence-transformers 5.4 or newer."""

import os
from typing import Any

import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers.base.modules.module import Module
from torch import Tensor

from ..errors import ConfigError
from .pooled import without_sinks

FLAT = "cu_seq_lens_q"  # of a batch without padding: where each text begins in one row, and where the last one ends

# Older releases weight the tokens of a weighted mean by where they stand in the row, whether the tokens before them count or not.
WEIGHTS_BY_COLUMN = Version(sentence_transformers.__version__) < Version("6")


class WithoutSinks(Module):
    """Hides the first tokens of each text from the modules after it, such as a Pooling. It stands after the Transformer.

    A text that has no other tokens keeps its last one.

    Args:
        num_sink_tokens: How many tokens of each text.
    """

    config_keys = ["num_sink_tokens"]

    def __init__(self, num_sink_tokens: int) -> None:
        super().__init__()
        if not isinstance(num_sink_tokens, int) or isinstance(num_sink_tokens, bool) or num_sink_tokens < 0:
            raise ConfigError(f"num_sink_tokens must be an int of 0 or more, got {num_sink_tokens!r}")
        self.num_sink_tokens = num_sink_tokens

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Change the mask of the features; of a batch without padding, take the tokens themselves out.

        Args:
            features: `attention_mask`, (texts, length), which may be missing where there is no padding; `token_embeddings`,
                (texts, length, width), or (1, all tokens, width) with `cu_seq_lens_q`. `prompt_length`, if there is one, counts
                the sink tokens too.
            **kwargs: Not used.

        Returns:
            Other features, as of texts that begin after their sink tokens.
        """
        if not self.num_sink_tokens:
            return features
        features = {**features}  # a loss may call the model with the same ones again
        if FLAT in features:
            self._take_out(features)
        else:
            tokens = features["token_embeddings"]
            mask = features.get("attention_mask")
            if mask is None or mask.shape != tokens.shape[:2]:  # as Pooling does
                mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
            features["attention_mask"] = without_sinks(mask, self.num_sink_tokens)
            if WEIGHTS_BY_COLUMN:
                _move_to_the_left(features)
        if "prompt_length" in features:  # counted from the first token that is left
            rest = features["prompt_length"] - self.num_sink_tokens
            features["prompt_length"] = rest.clamp(min=0) if isinstance(rest, Tensor) else max(rest, 0)
        return features

    def _take_out(self, features: dict[str, Any]) -> None:
        ends = features[FLAT]
        lengths = ends.diff()
        left_out = (lengths - 1).clamp(min=0, max=self.num_sink_tokens)
        starts = torch.repeat_interleave(ends[:-1] + left_out, lengths)
        kept = torch.arange(len(starts), device=ends.device) >= starts
        for name in ("token_embeddings", "input_ids", "position_ids", "seq_idx"):
            if isinstance(features.get(name), Tensor):
                features[name] = features[name][:, kept]
        ends = torch.cat([ends[:1], (lengths - left_out).cumsum(0).to(ends.dtype)])
        features[FLAT] = features["cu_seq_lens_k"] = ends

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the settings to a folder."""
        os.makedirs(output_path, exist_ok=True)
        self.save_config(output_path)


def _move_to_the_left(features: dict[str, Any]) -> None:
    """Let each row begin with the first token that is left, in place. What stood before it follows at the end, masked."""
    tokens, mask = features["token_embeddings"], features["attention_mask"]
    first = mask.ne(0).int().argmax(1, keepdim=True)
    columns = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    features["attention_mask"] = mask.gather(1, columns)
    if isinstance(ids := features.get("input_ids"), Tensor) and ids.shape == mask.shape:
        features["input_ids"] = ids.gather(1, columns)
    features["token_embeddings"] = tokens.gather(1, columns[..., None].expand_as(tokens))
