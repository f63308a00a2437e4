"""What `outputs.logits` holds where a batch has labels."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

EvalLogits = Literal["full", "argmax", "scores"]
EVAL_LOGITS: tuple[EvalLogits, ...] = get_args(EvalLogits)


class KeptLogits:
    """Collects, chunk by chunk, what evaluation needs of the logits of the scored positions."""

    def __init__(self, form: EvalLogits, shape: torch.Size, rows: Tensor) -> None:
        """Start with nothing.

        Args:
            form: all logits, the token that each position predicts, or that token and its loss.
            shape: of the labels, (batch, length).
            rows: (n,), int64, the scored places among the batch * length.
        """
        self.form, self.shape, self.rows = form, shape, rows
        self._flat: Tensor | None = None

    def add(self, part: slice, logits: Tensor, targets: Tensor) -> None:
        """Take one chunk; see `loss.LogitsSink`."""
        values = logits.detach() if self.form == "full" else logits.argmax(-1)
        if self.form == "scores":
            losses = F.cross_entropy(logits.detach().float(), targets.to(logits.device), reduction="none")
            values = torch.stack([values.float(), losses], -1)
        if self._flat is None:
            fill = -100 if self.form == "argmax" else 0
            self._flat = values.new_full((self.shape.numel(), *values.shape[1:]), fill)
        self._flat[self.rows[part].to(values.device)] = values

    @property
    def logits(self) -> Tensor | None:
        """(batch, length, vocab), (batch, length) or (batch, length, 2); None if nothing was added."""
        return None if self._flat is None else self._flat.view(*self.shape, *self._flat.shape[1:])
