"""Tables that are written row by row, and the time that is left: what was measured is kept if the time is over."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class Deadline:
    """Seconds from now on.

    Args:
        seconds: How many.
        clock: What tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, below 0 where the time is over."""
        return self._end - self._clock()


@dataclass
class Run:
    """What each part is given."""

    device: torch.device
    dry: bool  # tiny sizes, and the stand-ins of `stand_ins`
    deadline: Deadline
    write: Callable[[str], None]
    options: Any = None  # of the command line
    problems: list[str] = field(default_factory=list)  # what failed, for the exit code

    def table(self, *columns: str) -> "LiveTable":
        """A table whose head is written at once."""
        return LiveTable(columns, self.write)

    def allows(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left; if not, a line says what was left out."""
        if self.deadline.left() >= seconds:
            return True
        self.write(f"\nLeft out, {max(0, self.deadline.left()):.0f} s were left: {what}")
        return False

    def failed(self, what: str, error: BaseException) -> str:
        """Keep what went wrong, and say it in a few words."""
        words = problem(error)
        self.problems.append(f"{what}: {words}")
        return words


class LiveTable:
    """A Markdown table, row by row."""

    def __init__(self, columns: Sequence[str], write: Callable[[str], None]) -> None:
        self.columns = tuple(columns)
        self._write = write
        write("\n" + self._line(self.columns) + "\n" + self._line(["---"] * len(self.columns)))

    def add(self, *cells: object) -> None:
        """Write one row. What a row lacks at its end stays empty."""
        if len(cells) > len(self.columns):
            raise ValueError(f"{len(cells)} cells for the columns {self.columns}")
        self._write(self._line([str(c) for c in cells] + [""] * (len(self.columns) - len(cells))))

    @staticmethod
    def _line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def problem(error: BaseException) -> str:
    """An error's kind and the beginning of its message."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def writer(output: str | None) -> Callable[[str], None]:
    """Prints each line at once, and writes it to the file `output` too."""
    if output:
        Path(output).write_text("")

    def write(text: str) -> None:
        print(text, flush=True)
        if output:
            with open(output, "a") as file:
                file.write(text + "\n")

    return write


def stop_after(seconds: float, write: Callable[[str], None]) -> threading.Timer:
    """End this process after `seconds`, whatever it is at; a kernel or a compiler may not return. `cancel()` it before."""

    def stop() -> None:
        write(f"\nStopped after {seconds:.0f} s, in the middle of a part.")
        os._exit(3)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer
