"""The model of a row, opened."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ladder.rows import ATTENTIONS, OF_ADAPTERS, Row
from benchmarks.ladder.training import Plan, Settings, model_settings, trained
from bidirect_patch.cli.simcse.model import load_encoder
from bidirect_patch.cli.simcse.settings import EncoderArguments
from bidirect_patch.cli.sweep.model import Source, load_model, load_tokenizer
from bidirect_patch.cli.sweep.parts import Parts, take_apart
from bidirect_patch.cli.sweep.passes import Depth, states
from bidirect_patch.cli.sweep.setups import Attention
from bidirect_patch.cli.sweep.steps import positions
from bidirect_patch.cli.sweep.texts import batches, token_ids

FIFTHS = 5  # words and retrieval look at so many depths, evenly spread


class Opened(NamedTuple):
    """A model and its tokenizer.

    Attributes:
        parts: The model.
        tokenizer: Its tokenizer.
        attention: Who sees whom in it.
        limit: How many positions it has.
    """

    parts: Parts
    tokenizer: Any
    attention: Attention
    limit: int | None

    @property
    def depths(self) -> list[Depth]:
        """Some depths, with as many blind layers at the end of each as the attention has."""
        layers = len(self.parts.layers)
        ends = {max(round(layers * part / FIFTHS), self.attention.blind + 1) for part in range(1, FIFTHS + 1)}
        known = ends if self.parts.after is not None else {layers}
        return [Depth(self.attention.blind, end) for end in sorted(known)]

    @torch.no_grad()
    def token_states(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Depth, Tensor]]:
        """Which texts are in a batch, a depth, and the states there, (texts, length, width), float32, padded on the right."""
        for batch, tokens, mask in batches(ids, range(len(ids))):
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            for depth, state in states(self.parts, self.attention.family, self.depths, tokens, mask):
                yield batch, depth, state.float().cpu()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parts.model.parameters()).device


def open_row(plan: Plan, row: Row) -> Opened:
    """The model of a row, which is trained first."""
    folders = trained(plan, row)
    if not folders:
        return _opened(*_untrained(plan.source), ATTENTIONS.get(row.attention, ATTENTIONS["sink"]))
    last = row.steps[-1]
    if last in OF_ADAPTERS:
        return open_adapter(plan, row, folders[last])
    return _trained(plan, row, {"model_name_or_path": folders[last], "gguf_file": None, "layers": None})


def open_adapter(plan: Plan, row: Row, folder: str | None) -> Opened:
    """The layers that a row trains, with an adapter of it; without one, as they are before that."""
    return _trained(plan, row, {"peft_model_name_or_path": folder})


def _trained(plan: Plan, row: Row, source: Settings) -> Opened:
    attention = ATTENTIONS[row.attention]
    settings = model_settings(plan, row) | {"bidirectional": attention.bidirectional} | source
    settings["torch_dtype"] = plan.source.torch_dtype
    module = load_encoder(EncoderArguments(**settings, lora_r=0, simcse_dropout=0.0), {})[0][0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _opened(module.model.eval().requires_grad_(False).to(device), module.tokenizer, attention)


def _opened(model: Any, tokenizer: Any, attention: Attention) -> Opened:
    limit = positions(model)
    short = torch.tensor(token_ids(tokenizer, ["a short text"], limit), device=next(model.parameters()).device)
    return Opened(take_apart(model, short), tokenizer, attention, limit)


@lru_cache(maxsize=1)
def _untrained(source: Source) -> tuple[Any, Any]:
    """The model, which its rows share: each attends in a block that leaves it as it was."""
    return load_model(source), load_tokenizer(source)
