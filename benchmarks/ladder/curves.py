"""The encoder by step of masked next token prediction, with one setting changed at a time.

Each run is `mntp --eval_sts` on pairs of STS-B's development set, with the plain mean of the last layer's tokens.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ladder.plan import Settings
from benchmarks.ladder.table import markdown
from benchmarks.ladder.texts import Pairs

PAIRS, POINTS = 500, 5  # evaluated at so many steps of each run, beside step 0

CHANGES: dict[str, Settings] = {
    "as in the table": {},
    "learning rate 2e-4": {"learning_rate": 2e-4},
    "learning rate 5e-5, LLM2Vec's": {"learning_rate": 5e-5},
    "80% hidden": {"mlm_probability": 0.8},
    "hidden by the end token": {"mask_token_type": "eos"},
    "20% hidden": {"mlm_probability": 0.2},
    "10% to 60% hidden, drawn per text": {"mlm_probability": [0.1, 0.6]},
}


@dataclass(frozen=True)
class Curve:
    """What was seen of one run.

    Args:
        spearman: 100 times Spearman's correlation at each step. Step 0: bidirectional, untrained.
        causal: The same of the causal model.
        loss: Of text held out, in nats, at each step.
    """

    spearman: Mapping[int, float]
    causal: float
    loss: Mapping[int, float]


def evaluation(pairs: Pairs, file: Path, steps: int) -> Settings:
    """The settings by which a run evaluates itself; writes `file`."""
    chosen = pairs.shortened(PAIRS)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(("sentence1", "sentence2", "score"))
        writer.writerows(zip(chosen.first, chosen.second, chosen.scores.tolist(), strict=True))
    every = max(1, steps // POINTS)
    return {"eval_sts": str(file), "do_eval": True, "eval_strategy": "steps", "eval_steps": every, "max_eval_samples": 32}


def read(folder: Path) -> Curve:
    """The curve of a run that is done."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = json.loads((folder / "all_results.json").read_text())
    seen = [entry for entry in log if "eval_sts_spearman" in entry]
    spearman = {0: found["before_sts_spearman"]} | {entry["step"]: entry["eval_sts_spearman"] for entry in seen}
    loss = {0: found["before_loss"]} | {entry["step"]: entry["eval_loss"] for entry in seen}
    return Curve({step: 100 * value for step, value in spearman.items()}, 100 * found["causal_sts_spearman"], loss)


def write_table(curves: Mapping[str, Curve]) -> str:
    """A row for each run: the correlation at each step, and the last loss."""
    if not curves:
        return "no run is done\n"
    steps = sorted({step for curve in curves.values() for step in curve.spearman})
    lines = [["after step", *map(str, steps), "held-out loss"]]
    for name, curve in curves.items():
        values = [f"{curve.spearman[step]:.1f}" if step in curve.spearman else "" for step in steps]
        lines.append([name, *values, f"{curve.loss[max(curve.loss)]:.2f}"])
    causal = next(iter(curves.values())).causal
    return f"{markdown(lines)}\n\nThe causal model, untrained: {causal:.1f}.\n"
