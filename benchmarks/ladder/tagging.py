"""Tags of words by fine-tuning: LoRA and a linear layer, by `bidirect-patch words`. A word is read as the mean of its tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder.rows import ATTENTIONS, Row
from benchmarks.ladder.texts import Sentence
from benchmarks.ladder.training import Plan, on_adapter, run, run_settings, trained
from benchmarks.ladder.words import counts, score
from bidirect_patch.cli.words.saving import PREDICTIONS

TASKS = ("relation", "names")
SETTINGS = {"lora_r": 16, "learning_rate": 5e-4, "merge_subwords": True}


def measured(plan: Plan, row: Row, fit: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, Any]:
    """The result of a row: for each task how it is read, its value, and the counts of `words.counts`."""
    settings = run_settings(plan, row) | on_adapter(trained(plan, row)) | SETTINGS
    settings |= {"bidirectional": ATTENTIONS[row.attention].bidirectional, "max_steps": plan.tagging_steps}
    results = {}
    for task in TASKS:
        files = {part: _write(plan.out / "texts", part, sentences, task) for part, sentences in (("dev", fit), ("test", test))}
        if None in files.values():
            continue
        folder = plan.out / "tagging" / "trained" / f"{task}-{row.file}"
        run("words", settings | {"train_file": [files["dev"]], "test_file": [files["test"]], "task": "labels"}, folder, plan.log)
        found = _counted(folder / PREDICTIONS, _labelled(test, task), task)
        how = f"{plan.layers} layers, {plan.tagging_steps} steps"
        results[task] = {"how": how, "value": round(score(found), 2), "counts": found.tolist()}
    return {"": results}


def _labelled(sentences: Sequence[Sentence], task: str) -> list[Sentence]:
    return [sentence for sentence in sentences if task in sentence.labels]


def _write(folder: Path, part: str, sentences: Sequence[Sentence], task: str) -> str | None:
    """The file of the sentences with their labels, which `words` reads; None if no label is known."""
    rows = [{"tokens": s.words, "labels": s.labels[task]} for s in _labelled(sentences, task)]
    if len({label for row in rows for label in row["labels"]}) < 2:
        return None
    file = folder / f"{part}-{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def _counted(file: Path, sentences: Sequence[Sentence], task: str) -> np.ndarray:
    given = [json.loads(line)["labels"] for line in file.read_text(encoding="utf-8").splitlines()]
    true = [sentence.labels[task] for sentence in sentences]
    assert list(map(len, given)) == list(map(len, true)), f"{file} has other words"
    numbers = np.repeat(np.arange(len(true)), list(map(len, true)))
    return counts(np.concatenate(given), np.concatenate(true), numbers, task)
