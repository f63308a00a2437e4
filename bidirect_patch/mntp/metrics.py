"""Accuracy and loss over the masked tokens, for a `Trainer` of one's own."""

import math
from typing import Any

import numpy as np

from ..errors import HeadError
from .collator import IGNORED


def mntp_metrics(prediction: Any) -> dict[str, float]:
    """A `compute_metrics` for `transformers.Trainer` and a model with the MNTP head.

    The output at position i predicts the label at i + 1. Labels of -100 count nowhere.

    Args:
        prediction: a `transformers.EvalPrediction`. Its `label_ids` are (batch, length), int. Its `predictions` are what
            `eval_logits` of `apply_mntp_head` made: "full" (batch, length, vocab), "argmax" (batch, length) of integers, or
            "scores" (batch, length, 2). Of a tuple, the first is taken.

    Returns:
        `accuracy`: the share of the scored tokens that were predicted; NaN if there are none. `masked_tokens`: how many
        are scored. With "scores" also `loss`: the mean cross-entropy per scored token, in nats. `Trainer` reports it as
        `eval_loss`, in place of its own mean over batches.

    Raises:
        HeadError: predictions of another form, or of another shape than the labels.

    Example:
        >>> import numpy as np, transformers
        >>> from bidirect_patch.mntp.metrics import mntp_metrics
        >>> labels, predicted = np.array([[-100, 5, 6, -100]]), np.array([[5, 7, -100, -100]])
        >>> mntp_metrics(transformers.EvalPrediction(predictions=predicted, label_ids=labels))
        {'accuracy': 0.5, 'masked_tokens': 2}
    """
    if not hasattr(prediction, "predictions") or not hasattr(prediction, "label_ids"):
        raise HeadError(f"expected a transformers.EvalPrediction, got {type(prediction).__name__}")
    predictions, labels = (_first(given) for given in (prediction.predictions, prediction.label_ids))
    if labels.ndim != 2 or predictions.ndim not in (2, 3) or predictions.shape[:2] != labels.shape:
        raise HeadError(
            f"predictions of shape {predictions.shape} for labels of shape {labels.shape}: give (batch, length, vocab), "
            "(batch, length) or (batch, length, 2), as apply_mntp_head makes them"
        )
    scored = labels[:, 1:] != IGNORED
    targets, found = labels[:, 1:][scored], predictions[:, :-1][scored]  # (n,), and (n, vocab), (n,) or (n, 2)
    count = len(targets)
    has_losses = found.ndim == 2 and found.shape[1] == 2
    tokens = found if found.ndim == 1 else found[:, 0] if has_losses else found.argmax(-1)
    of = count or math.nan  # of nothing there is no mean
    metrics = {"accuracy": float((tokens == targets).sum() / of), "masked_tokens": count}
    if has_losses:
        metrics["loss"] = float(found[:, 1].sum(dtype=np.float64) / of)
    return metrics


def _first(given: Any) -> np.ndarray:
    return np.asarray(given[0] if isinstance(given, (tuple, list)) and given else given)
