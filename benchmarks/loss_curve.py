"""Draw the losses of a run of `bidirect-patch mntp` by step.

Reads trainer_state.json of the run's output_dir, and all_results.json beside it for the two evaluations before training. Writes
figures/mntp_loss.svg; `python -m benchmarks.loss_curve OUTPUT_DIR`, one second.
"""

import argparse
import json
import os
from typing import Any

from benchmarks.svg import line, save, text

LEFT, TOP, WIDTH, HEIGHT, RIGHT = 52, 44, 520, 260, 260
BASELINES = (("causal_loss", "causal, before training"), ("before_loss", "bidirectional, untrained"))


def read(folder: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The log of a run, and all its results."""
    parts = []
    for name in ("trainer_state.json", "all_results.json"):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            parts.append(json.load(file))
    return parts[0]["log_history"], parts[1]


def draw(log: list[dict[str, Any]], results: dict[str, float]) -> list[str]:
    """The figure's parts."""
    losses = {key: [(e["step"], e[key]) for e in log if key in e] for key in ("loss", "eval_loss")}
    if "before_loss" in results:
        losses["eval_loss"].insert(0, (0, results["before_loss"]))
    known = [(label, results[key]) for key, label in BASELINES if key in results]
    values = [loss for points in losses.values() for _, loss in points] + [loss for _, loss in known]
    low, high = int(min(values)), int(max(values)) + 1
    last = max(step for points in losses.values() for step, _ in points)

    def at(step: float, loss: float) -> tuple[float, float]:
        return LEFT + WIDTH * step / last, TOP + HEIGHT * (high - loss) / (high - low)

    parts = [text(LEFT, 20, "Masked next token prediction: loss by step (nats)", "title")]
    for loss in range(low, high + 1):
        parts += [line([at(0, loss), at(last, loss)], "axis"), text(LEFT - 8, at(0, loss)[1] + 4, str(loss), anchor="end")]
    for step in sorted({round(last * i / 4) for i in range(5)}):
        parts.append(text(at(step, low)[0], TOP + HEIGHT + 20, str(step), anchor="middle"))
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "step", anchor="middle"))
    for label, loss in known:
        parts.append(line([at(0, loss), at(last, loss)], "dashed"))
        parts.append(text(LEFT + WIDTH + 8, at(0, loss)[1] + 4, f"{label}: {loss:.2f}"))
    for key, kind in (("loss", "line2"), ("eval_loss", "line1")):
        parts.append(line([at(*point) for point in losses[key]], kind))
    return parts + legend()


def legend() -> list[str]:
    """What the two lines are."""
    parts = []
    for number, (kind, label) in enumerate((("line1", "text held out"), ("line2", "the batch of the step"))):
        y = TOP + HEIGHT - 40 + 22 * number
        parts += [line([(LEFT + WIDTH + 8, y - 4), (LEFT + WIDTH + 34, y - 4)], kind), text(LEFT + WIDTH + 42, y, label)]
    return parts


def main() -> None:
    """Read, and draw."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("output_dir", help="that of the run")
    log, results = read(options.parse_args().output_dir)
    save("mntp_loss", LEFT + WIDTH + RIGHT, TOP + HEIGHT + 56, draw(log, results))
    print(f"{sum('loss' in entry for entry in log)} losses of training, {sum('eval_loss' in e for e in log)} evaluations")


if __name__ == "__main__":
    main()
