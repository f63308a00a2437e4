"""What every benchmark here measures with: paired timings, memory growth in a fresh process, this machine's speed.

Times are of `torch.utils.benchmark`, in CPU seconds of this process on one thread unless a benchmark says otherwise:
on a machine that does other work too, they vary far less than wall-clock seconds, and on an idle one they are equal.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.benchmark import Timer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def quartiles(values: list[float]) -> Ratio:
    """Median, lower and upper quartile of `values` (one value is its own spread)."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def paired_times(
    steps: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each step in each of `rounds` rounds: a round runs every step once, so that a slow minute hits all."""
    timers = {
        name: Timer("step()", globals={"step": step}, timer=clock, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            # The run from which it estimates the block warms up; `timeit` would warm up twice.
            times[name].append(timer.blocked_autorange(min_run_time=0).median)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, Ratio]:
    """Each step's time over that of `base`, round by round."""
    return {name: quartiles([a / b for a, b in zip(values, times[base])]) for name, values in times.items()}


def peak_growth(module: str, *runs: Sequence[str]) -> list[float]:
    """Bytes by which resident memory grew at its peak, in `python -m module *arguments` for each arguments of `runs`.

    That program calls `report_growth(step)` once, and that is what it prints. As many run at a time as there are cores:
    a neighbour slows a process, but does not make it grow.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda arguments: _growth([sys.executable, "-m", module, *arguments]), runs))


def _growth(command: list[str]) -> float:
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["growth"]


def report_growth(step: Callable[[], object]) -> None:
    """Run `step` once and print, as JSON, by how many bytes resident memory grew at its peak (Linux)."""
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    step()
    print(json.dumps({"growth": _resident("VmHWM") - before}))


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


@cache
def matmul_rate(
    size: int = 2048, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.process_time
) -> float:
    """FLOPs per second of a square matmul here, by the same clock: the arithmetic alone costs FLOPs / rate seconds."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    times = paired_times({"matmul": lambda: a @ b}, rounds=5, clock=clock)["matmul"]
    return 2 * size**3 / statistics.median(times)


def table(rows: list[dict[str, object]]) -> str:
    """`rows` as a Markdown table; the first row's keys are the columns."""
    cells = [list(rows[0]), *([str(row[key]) for key in rows[0]] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
