"""The tasks: mteb's own by their names, and files of scored pairs as tasks of semantic similarity."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
from datasets import DatasetDict
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from ...errors import ConfigError, one_line
from ..pairs import load_pairs

ENDINGS = (".csv", ".jsonl")
SPLIT = "test"


def get_tasks(names: Sequence[str]) -> list[Any]:
    """Get tasks by their names, or by the files of their pairs.

    Raises:
        ConfigError: mteb has no such task, or a file can't be used.
    """
    return [_of_file(name) if name.endswith(ENDINGS) else _of_mteb(name) for name in names]


def _of_mteb(name: str) -> Any:
    try:
        return mteb.get_task(name)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"mteb has no task {name!r}: {one_line(error)[:300]}") from error


def _of_file(path: str) -> Any:
    pairs = load_pairs("tasks", path, None)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    described = TaskMetadata(
        name=Path(path).stem,
        description=f"Pairs of sentences with scores, from the file {Path(path).name}.",
        dataset={"path": Path(path).name, "revision": digest},
        type="STS",
        category="t2t",
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )

    class PairsOfFile(AbsTaskSTS):
        """A task of one file."""

        metadata = described
        min_score, max_score = min(pairs["score"]), max(pairs["score"])

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            """Take the pairs, which are loaded already."""
            self.dataset = DatasetDict({SPLIT: pairs})
            self.data_loaded = True

    return PairsOfFile()
