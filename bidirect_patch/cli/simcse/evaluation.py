"""Evaluation on pairs of sentences with scores: Spearman's correlation of the scores with the cosines."""

from typing import Any

from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from ..pairs import PAIR_COLUMNS
from ..run_report import Column, Report
from .settings import METRICS


class PairEvaluator(EmbeddingSimilarityEvaluator):
    """sentence-transformers' evaluator, which reads as many tokens of a text as the saved encoder will.

    Args:
        pairs: A data set with the columns `sentence1`, `sentence2` and `score`.
        batch_size: Texts at a time.
        max_seq_length: Tokens of a text.
    """

    def __init__(self, pairs: Any, batch_size: int, max_seq_length: int) -> None:
        columns = (list(pairs[name]) for name in PAIR_COLUMNS)
        super().__init__(*columns, batch_size=batch_size, main_similarity="cosine")
        self.max_seq_length = max_seq_length

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate a SentenceTransformer."""
        module = model[0]
        trained_length = module.max_seq_length
        module.max_seq_length = self.max_seq_length
        try:
            metrics: dict[str, float] = super().__call__(model, *args, **kwargs)
        finally:
            module.max_seq_length = trained_length
        return {name: float(value) for name, value in metrics.items()}


def make_report(trainer: Any) -> Report:
    """Return the report of a run: the correlation of Spearman, in percent."""
    return Report(trainer, "contrastive training", (Column(METRICS[0], "Spearman", 10, ".1%"),))


def evaluate_before(trainer: Any, report: Report) -> None:
    """Evaluate before the first step."""
    report.add("before", "before training", trainer.evaluate_before("before"))
    report.show()
