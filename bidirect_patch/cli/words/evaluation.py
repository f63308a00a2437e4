"""Accuracy over words, and F1 of spans; of the classifier, and of each word's most frequent label."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from .. import extra_needed
from ..run_report import Column, Report
from .data import Sentence
from .tokens import IGNORED

_SPAN_LABEL = re.compile(r"O|[BIES]-.+")
SPAN_METRICS = ("f1", "precision", "recall")


def are_spans(labels: Sequence[str]) -> bool:
    """Whether labels are parts of spans: O, and B-, I- and the like with a kind."""
    return len(labels) > 1 and all(_SPAN_LABEL.fullmatch(label) for label in labels)


def check_seqeval() -> None:
    """Raise BackendError if seqeval is not installed, which counts spans."""
    with extra_needed("words", subject="F1 of spans"):
        import seqeval.metrics  # noqa: F401


def summarize(prediction: EvalPrediction, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of an evaluation.

    Args:
        prediction: `predictions` are the numbers of the predicted labels and the losses of the words, each
            (sentences, words); `label_ids` the numbers of the labels, -100 where nothing is scored.
        labels: The labels by their numbers. A number that is larger stands for another label.
    """
    predicted, losses = map(np.asarray, prediction.predictions)
    wanted = np.asarray(prediction.label_ids)
    scored = wanted != IGNORED
    counted = scored & (wanted < len(labels))
    known = [*labels, *(f"B-unknown {n}" for n in range(len(labels), wanted.max(initial=0) + 1))]
    rows = [(row[is_scored], own[is_scored]) for row, own, is_scored in zip(predicted, wanted, scored)]
    metrics = score([([known[n] for n in row], [known[n] for n in own]) for row, own in rows], labels)
    return {"loss": float(losses[counted].sum() / (counted.sum() or math.nan)), **metrics}


def score(pairs: Sequence[tuple[Sequence[str], Sequence[str]]], labels: Sequence[str]) -> dict[str, float]:
    """Return the accuracy over words, the number of words, and precision, recall and F1 if the labels are parts of spans.

    Args:
        pairs: For each sentence the predicted labels and the right ones.
        labels: The labels that are told apart.
    """
    right = sum(one == other for predicted, wanted in pairs for one, other in zip(predicted, wanted))
    words = sum(len(wanted) for _, wanted in pairs)
    metrics = {"accuracy": right / (words or math.nan), "words": float(words)}
    if are_spans(labels):
        check_seqeval()
        from seqeval import metrics as spans

        rows = [list(wanted) for _, wanted in pairs], [list(predicted) for predicted, _ in pairs]
        for name, function in zip(SPAN_METRICS, (spans.f1_score, spans.precision_score, spans.recall_score)):
            metrics[name] = float(function(*rows, zero_division=0))
    return metrics


def most_frequent_labels(
    train: Sequence[Sentence], sentences: Sequence[Sentence], labels: Sequence[str]
) -> dict[str, float]:
    """What is right if each word gets the label that it has most often in the training data: a baseline without a model.

    A word that is not there gets the most frequent label of all.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in train:
        for word, label in zip(*sentence):
            if label is not None:
                counts[word][label] += 1
    overall = sum(counts.values(), Counter()).most_common(1)[0][0]
    best = {word: counter.most_common(1)[0][0] for word, counter in counts.items()}
    pairs = []
    for sentence in sentences:
        kept = [(word, label) for word, label in zip(*sentence) if label is not None]
        pairs.append(([best.get(word, overall) for word, _ in kept], [label for _, label in kept]))
    return score(pairs, labels)


def make_report(trainer: Any) -> Report:
    """Return the report of a run: loss, accuracy, and F1 if the labels are parts of spans."""
    columns = [Column("loss", "loss", 8, ".3f"), Column("accuracy", "accuracy", 10, ".1%")]
    if are_spans(trainer.labels):
        columns.append(Column("f1", "F1", 8, ".1%"))
    return Report(trainer, "word-level task", tuple(columns))
