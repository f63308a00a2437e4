"""Seconds and peak memory of steps that take turns on one card."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.progress import Run
from benchmarks.report import spread

Step = Callable[[], object]
Way = Callable[[], AbstractContextManager[Step]]  # entered, the model is as this way has it

MOST_STEPS = 10
SECONDS_A_TURN = 0.3


@dataclass
class Measured:
    """What one way took."""

    seconds: list[float] = field(default_factory=list)  # for a step, one number a round
    peak: int = 0  # bytes by which memory grew at its peak; 0 on a CPU
    problem: str = ""

    def rate(self, count: float) -> str:
        """`count` things a second, at the median."""
        return f"{count / statistics.median(self.seconds):,.0f}"


def synchronized_clock(device: torch.device) -> Callable[[], float]:
    """Wall-clock seconds at which the device has done all that it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def take_turns(run: Run, ways: Mapping[str, Way], rounds: int = 3) -> dict[str, Measured]:
    """Time each way in each of `rounds` rounds, after a round that warms up and measures memory.

    A way that fails has its `problem` and is left out of later rounds. No round begins when the time is over.
    """
    found = {name: Measured() for name in ways}
    clock = synchronized_clock(run.device)
    steps: dict[str, int] = {}
    before = _allocated(run.device)
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if found[name].problem or (turn > 1 and run.deadline.left() < 0):
                continue
            try:
                with way() as step:
                    if turn == 0:
                        found[name].peak, steps[name] = _warm_up(step, run, before, clock)
                    else:
                        found[name].seconds.append(_turn(step, steps[name], clock))
            except Exception as error:  # one kernel's fault is a cell of the table
                found[name].problem = run.failed(name, error)
            _free(run.device)
    return found


def over(found: Mapping[str, Measured], way: str, base: str) -> str:
    """How many times as fast as `base` a way is, round by round."""
    if found[base].problem or not found[base].seconds:
        return ""
    return spread([b / a for a, b in zip(found[way].seconds, found[base].seconds)], 2)


def _turn(step: Step, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        step()
    return (clock() - start) / count


def _warm_up(step: Step, run: Run, before: int, clock: Callable[[], float]) -> tuple[int, int]:
    """Bytes at the peak, and how many steps make a turn of measurable length."""
    step()
    _turn(step, 1, clock)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = _turn(step, 1, clock)
    peak = torch.cuda.max_memory_allocated(run.device) - before if run.device.type == "cuda" else 0
    return peak, 1 if run.dry else max(1, min(MOST_STEPS, int(SECONDS_A_TURN / seconds)))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
