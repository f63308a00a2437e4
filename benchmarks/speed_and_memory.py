"""Draw time and memory as shares of those of the peer in the same run, from the tables of RESULTS.md.

Writes figures/speed_and_memory.svg; `python -m benchmarks.speed_and_memory`, one second.
"""

import os
import re
from typing import NamedTuple

from benchmarks.report import FIGURES, parser
from benchmarks.svg import cell, line, save, text

LEFT, TOP, WIDTH, ROW = 330, 56, 420, 30


class Bar(NamedTuple):
    """A bar: what was measured, its row in a table, and how its share is read.

    Attributes:
        label: What is compared, beside what.
        section: The title of the section of RESULTS.md.
        row: How the row begins, the cells joined by a space.
        column: The name of the column, which holds three numbers; the first number that ends nothing is taken.
        inverse: The column says how many times as fast, so that the share of time is one over it.
    """

    label: str
    section: str
    row: str
    column: str
    inverse: bool = False


BARS = (
    Bar("MNTP step, time / the stock step", "The MNTP head against the stock step", "20% trained ours", "time / stock"),
    Bar("MNTP step, memory / the stock step", "The MNTP head against the stock step", "20% trained ours", "growth / stock"),
    Bar("padding-free, time / padded batches", "Padding-free batches", "padding_free ", "over padded", True),
    Bar("collator, time / transformers' own", "The collator", "lists ", "ours / stock", True),
    Bar("patch, time / is_causal=False", "The patch against the peers", "4 layers of 512, 2x256 padded", "ours / peer"),
    Bar("patch, time / llm2vec", "Beside llm2vec 0.2.3", "sdpa padded", "ours / llm2vec"),
)


def section(results: str, title: str) -> str:
    """The text of one section of RESULTS.md."""
    return results.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def value(body: str, bar: Bar) -> tuple[float, float, float]:
    """The least, the middle and the greatest share that a row's cell gives."""
    rows = [[part.strip() for part in each.strip("|").split("|")] for each in body.splitlines() if each.startswith("|")]
    head = next(row for row in rows if bar.column in row)
    found = next(row for row in rows if " ".join(row).startswith(bar.row))
    numbers = sorted(float(number) for number in re.findall(r"[\d.]+", found[head.index(bar.column)]))
    if bar.inverse:
        numbers = sorted(1 / number for number in numbers)
    low, middle, high = numbers
    return low, middle, high


def draw(shares: list[tuple[str, tuple[float, float, float]]], machine: str) -> list[str]:
    """The figure's parts."""
    most = max(high for _, (*_, high) in shares)
    end = TOP + ROW * len(shares)

    def at(share: float) -> float:
        return LEFT + WIDTH * share / most

    parts = [text(16, 20, "Time and memory as a share of the peer's, in one run (1: the same; less is better)", "title")]
    parts.append(text(16, 40, f"{machine}. The whisker is the spread over rounds.", "small"))
    for number, (label, (low, middle, high)) in enumerate(shares):
        y = TOP + number * ROW
        parts.append(text(LEFT - 10, y + 18, label, anchor="end"))
        parts.append(cell(LEFT, y + 4, (at(middle) - LEFT, ROW - 10), "second" if "memory" in label else "first"))
        parts.append(line([(at(low), y + ROW / 2 - 1), (at(high), y + ROW / 2 - 1)]))
        parts.append(text(at(high) + 8, y + 18, f"{middle:.2f}"))
    parts.append(line([(at(1), TOP - 4), (at(1), end)], "dashed"))
    return parts


def main() -> None:
    """Read, and draw."""
    parser(__doc__, 1).parse_args()
    with open(os.path.join(os.path.dirname(FIGURES), "RESULTS.md"), encoding="utf-8") as file:
        results = file.read()
    shares = [(bar.label, value(section(results, bar.section), bar)) for bar in BARS]
    machine = re.search(r"^Machine: (.*?), Linux", results, re.MULTILINE)
    save("speed_and_memory", LEFT + WIDTH + 60, TOP + ROW * len(shares) + 14, draw(shares, machine[1] if machine else ""))
    for label, (low, middle, high) in shares:
        print(f"{label:38}{low:7.3f}{middle:7.3f}{high:7.3f}")


if __name__ == "__main__":
    main()
