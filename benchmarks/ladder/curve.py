"""How sentences are told apart along one run of training: some of its checkpoints, each read in its best way."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ladder.opened import open_adapter
from benchmarks.ladder.rows import Row
from benchmarks.ladder.sentences import Sets, read
from benchmarks.ladder.training import Plan, checkpoints, tokens_a_step
from bidirect_patch.cli.sweep.model import load_tokenizer
from bidirect_patch.cli.sweep.texts import Pairs


def measured(plan: Plan, row: Row, points: Sequence[int], dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The result of a row: its line after each number of tokens, with the loss of MNTP on texts held out; 0 is before training.

    Args:
        plan: What all rows have in common.
        row: The row, of one step of training.
        points: Numbers of tokens, each a multiple of the first.
        dev: The pairs to choose on.
        sets: The pairs to report.
    """
    every = max(1, round(points[0] / tokens_a_step(plan, row, load_tokenizer(plan.source))))
    steps = {0: 0} | {tokens: every * (tokens // points[0]) for tokens in points}
    folder = checkpoints(plan, row, every, max(points) // points[0])
    history = _json(folder / "trainer_state.json")["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    losses[0] = _json(folder / "all_results.json").get("before_loss")
    lines = {}
    for tokens, step in steps.items():
        plan.log(f"{row}: {tokens:,} tokens, {step} steps")
        (line,) = read(open_adapter(plan, row, str(folder / f"checkpoint-{step}") if step else None), row, dev, sets).values()
        lines[str(tokens)] = line | {"steps": step, "loss": losses.get(step)}
    return lines


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
