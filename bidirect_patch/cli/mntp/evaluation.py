"""Loss and accuracy over masked tokens, of the model that is trained and of those before it."""

import math
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel

from ...mntp.collator import IGNORED
from ...patch import bidirectional
from ..run_report import Column, Report
from .settings import SPEARMAN


def masked_token_sums(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce a batch to what its evaluation needs.

    Args:
        scores: (batch, length, 2), float32. What the head returns as "scores": at position i the token that is
            predicted for position i + 1, and the loss of that prediction.
        labels: (batch, length), int64, -100 where nothing is scored.

    Returns:
        (batch, 3), float32. For each row the loss in nats, the number of correct tokens, the number of scored tokens.
    """
    targets = labels[:, 1:]
    scored = targets != IGNORED
    predicted, losses = scores[:, :-1].unbind(-1)
    correct = (predicted == targets) & scored
    return torch.stack([(losses * scored).sum(1), correct.sum(1), scored.sum(1)], 1).float()


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean loss and the accuracy over all scored tokens, from the sums of every row."""
    loss, correct, scored = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    count = scored or math.nan  # no tokens have no mean
    return {"loss": loss / count, "accuracy": correct / count, "masked_tokens": int(scored)}


def make_report(trainer: Any) -> Report:
    """Return the report of a run: loss and accuracy, and the correlation of Spearman in percent if there are pairs."""
    columns = [Column("loss", "loss", 8, ".3f"), Column("accuracy", "accuracy", 10, ".1%")]
    if trainer.sentence_pairs is not None:
        columns.append(Column(SPEARMAN, "Spearman", 10, ".1%"))
    return Report(trainer, "masked next token prediction", tuple(columns))


def evaluate_baselines(trainer: Any, model: PreTrainedModel, report: Report) -> None:
    """Evaluate before the first step: the causal model that was given, then the same weights bidirectional.

    Under FSDP and DeepSpeed this does nothing, because they can evaluate only after they have trained.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    with bidirectional(model, enabled=False):
        report.add("causal", "causal, before training", trainer.evaluate_before("causal"))
    report.add("before", "bidirectional, untrained", trainer.evaluate_before("before"))
    report.show()
