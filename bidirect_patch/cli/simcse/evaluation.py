"""Evaluation on pairs of sentences with scores: Spearman's correlation of the scores with the cosines."""

import math
from pathlib import Path
from typing import Any

from datasets import load_dataset
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from ...errors import ConfigError
from ..datafiles import READERS, reading
from ..report import Column, Report
from .settings import METRICS

PAIR_COLUMNS = ("sentence1", "sentence2", "score")


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


def load_pairs(path: str, cache_dir: str | None) -> Any:
    """Load the pairs to evaluate on.

    Returns:
        A data set with the columns `sentence1`, `sentence2` and `score`.

    Raises:
        ConfigError: The file cannot be read, a column is missing, or the scores are no numbers or all equal.
    """
    ending = Path(path).suffix[1:]
    if not Path(path).is_file() or READERS.get(ending) not in ("csv", "json"):
        raise ConfigError(f"no .csv or .jsonl file {path!r}: give validation_file, with {', '.join(PAIR_COLUMNS)}")
    with reading(path):
        pairs = load_dataset(READERS[ending], data_files=path, split="train", cache_dir=cache_dir)
    missing = [name for name in PAIR_COLUMNS if name not in pairs.column_names]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; it has {', '.join(pairs.column_names)}")
    wrong = _first_wrong(pairs)
    if wrong is not None:
        raise ConfigError(f"{path}, row {wrong + 1}: two texts and a number are needed; got {pairs[wrong]}")
    if len(set(pairs["score"])) < 2:
        raise ConfigError(f"{path} needs two different scores at least")
    return pairs


def make_report(trainer: Any) -> Report:
    """Return the report of a run: the correlation of Spearman, in percent."""
    return Report(trainer, "contrastive training", (Column(METRICS[0], "Spearman", 10, ".1%"),))


def evaluate_before(trainer: Any, report: Report) -> None:
    """Evaluate before the first step."""
    report.add("before", "before training", trainer.evaluate(metric_key_prefix="before"))
    report.show()


def evaluate_after(trainer: Any, report: Report) -> None:
    """Add the evaluations of the schedule to the report, then one of the result, and print it."""
    scheduled = [entry for entry in trainer.state.log_history if f"eval_{METRICS[0]}" in entry]
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    last = trainer.state.global_step
    for entry in scheduled:
        if best or entry["step"] != last:
            report.add_line("eval", f"step {entry['step']}", entry)
    label = f"after {last} steps" if trainer.args.do_train else "as it was loaded"
    if best:
        label = f"the best, of step {best.rpartition('-')[2]}"
    report.add("eval", label, trainer.evaluate())
    report.show()


def _first_wrong(pairs: Any) -> int | None:
    for number, row in enumerate(pairs):
        texts = [row[name] for name in PAIR_COLUMNS[:2]]
        score = row["score"]
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
        if not is_number or not all(isinstance(text, str) and text.strip() for text in texts):
            return number
    return None
