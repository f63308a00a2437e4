"""What the benchmarks print and draw: spreads, goals, figures."""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure import ROOT

FIGURES = os.path.join(ROOT, "benchmarks", "figures")


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--quick", action="store_true", help="tiny sizes and no figure: does it run, not how fast")
    return made


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))


def paired(times: Mapping[str, Sequence[float]], way: str, base: str) -> list[float]:
    """Time of `way` over that of `base`, round by round."""
    return [a / b for a, b in zip(times[way], times[base])]


def goal(claim: str, met: bool, why: str = "") -> None:
    """Print what was to be reached, whether it was, and where it wasn't why."""
    print(f"\nGoal: {claim}: {'met' if met else f'missed. {why}'.rstrip()}")


def bars(name: str, title: str, values: Mapping[str, Sequence[float]], goal: float | None = None) -> None:
    """figures/`name`.png: the median of each entry's values as a bar, minimum to maximum as a whisker."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.42 * len(values)))
    labels = list(values)[::-1]
    middle = [statistics.median(values[label]) for label in labels]
    low = [m - min(values[label]) for m, label in zip(middle, labels)]
    high = [max(values[label]) - m for m, label in zip(middle, labels)]
    axes.barh(labels, middle, xerr=(low, high), color="#4c78a8", ecolor="black", capsize=3)
    if goal is not None:
        axes.axvline(goal, color="#e45756", linestyle="--", label=f"goal {goal:g}")
        axes.legend(loc="best", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    save_figure(figure, name)


def curves(name: str, panels: Mapping[str, tuple[str, Sequence[float], Mapping[str, Sequence[float]]]]) -> None:
    """figures/`name`.png: for each panel title its x label, x values, and curves by name."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    figure, grid = pyplot.subplots(2, -(-len(panels) // 2), figsize=(10, 6), squeeze=False)
    for axes, (title, (label, x, lines)) in zip(grid.flat, panels.items()):
        for way, y in lines.items():
            axes.plot(x, y, marker="o", markersize=3, label=way, linestyle="--" if "floor" in way else "-")
        axes.set(title=title, xlabel=label, ylim=(0, None))
        axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
    save_figure(figure, name)


def pyplot_or_none() -> Any:
    """matplotlib's pyplot without a window, or None and a line that says so."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo figure: matplotlib is not installed.")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, name: str) -> None:
    """Write figures/`name`.png, and the line of Markdown that shows it."""
    os.makedirs(FIGURES, exist_ok=True)
    figure.tight_layout()
    figure.savefig(os.path.join(FIGURES, f"{name}.png"), dpi=80, bbox_inches="tight")
    print(f"\n![{name}](figures/{name}.png)")


def single_thread() -> None:
    """One thread: the least noise, and process time is then the step's own."""
    torch.set_num_threads(1)
