"""The table, and the differences between rows, from what was measured."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.ladder.encode import POOLINGS, Way
from benchmarks.ladder.plan import Row
from benchmarks.ladder.results import Cosines, best_way, gathered, plain_way
from benchmarks.ladder.statistics import DRAWS, Bootstrap, interval, mean_correlation
from benchmarks.ladder.texts import DEV, YEARS, Pairs

GROUPS: dict[str, tuple[str, ...]] = {"STS-B test": ("stsb-test",), "SICK": ("sick-r-test",), "STS12-16": YEARS}


class Comparison:
    """Rows against each other, on the same draws of pairs.

    Args:
        pairs: The sets by name.
        results: For each row, what was measured of each seed.
        draws: How many.
    """

    def __init__(self, pairs: Mapping[str, Pairs], results: Mapping[Row, Sequence[Cosines]], draws: int = DRAWS) -> None:
        self.pairs, self.results = pairs, {row: list(seeds) for row, seeds in results.items() if seeds}
        self.ways = {row: best_way(seeds, pairs[DEV].scores) for row, seeds in self.results.items()}
        self.draws = {group: Bootstrap([pairs[n].scores for n in names], draws) for group, names in GROUPS.items()}
        self._values: dict[tuple[Row, str], tuple[float, np.ndarray] | None] = {}

    def value(self, row: Row, group: str) -> tuple[float, np.ndarray] | None:
        """The value of a row in its best way, and in each draw. None: it was not measured."""
        if (row, group) not in self._values:
            cosines = gathered(self.results[row], self.ways[row], GROUPS[group])
            self._values[row, group] = None if cosines is None else self.draws[group].values(cosines)
        return self._values[row, group]

    def difference(self, row: Row, other: Row, group: str) -> tuple[float, float, float] | None:
        """A row minus another one, and the interval's two ends. None: one of them was not measured."""
        one, two = self.value(row, group), self.value(other, group)
        return None if one is None or two is None else (one[0] - two[0], *interval(one[1] - two[1]))

    def dev(self, row: Row) -> float:
        """The value on the development set in the best way, on average over seeds."""
        return self.value_on_dev(row, self.ways[row])

    def plain(self, row: Row, group: str) -> float | None:
        """The value with the mean of the last layer's tokens."""
        cosines = gathered(self.results[row], plain_way(self.results[row]), GROUPS[group])
        if cosines is None:
            return None
        return mean_correlation(cosines, self.draws[group].sets)

    def value_on_dev(self, row: Row, way: Way) -> float:
        """The value on the development set in one way, on average over seeds."""
        rows = np.stack([result[DEV][way] for result in self.results[row]])
        return mean_correlation([rows], [self.pairs[DEV].scores])


def difference_cell(found: tuple[float, float, float] | None) -> str:
    """A difference and its interval."""
    return "" if found is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found)


def cell(found: tuple[float, np.ndarray] | None) -> str:
    """A value and its interval."""
    if found is None:
        return ""
    low, high = interval(found[1])
    return f"{found[0]:.1f} [{low:.1f}, {high:.1f}]"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, whose first line is its head."""
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def write_table(comparison: Comparison, seconds: Mapping[Row, float]) -> str:
    """The rows, in Markdown. Numbers are 100 times Spearman's correlation."""
    head = ("row", "seeds", "training, s", "best way on STS-B dev", "STS-B dev", *GROUPS, "plain mean: STS-B test")
    lines = [head]
    for row in comparison.results:
        plain = comparison.plain(row, "STS-B test")
        lines.append(
            (
                row.name,
                str(len(comparison.results[row])) if row.trained else "",
                f"{seconds[row]:.0f}" if row in seconds else "",
                str(comparison.ways[row]),
                f"{comparison.dev(row):.1f}",
                *(cell(comparison.value(row, group)) for group in GROUPS),
                "" if plain is None else f"{plain:.1f}",
            )
        )
    return markdown(lines)


def write_differences(comparison: Comparison) -> str:
    """The best bidirectional row on the development set against each causal row, and what follows."""
    ours = [row for row in comparison.results if row.bidirectional and not row.ceiling]
    causal = [row for row in comparison.results if not row.bidirectional]
    if not ours or not causal:
        return ""
    best = max(ours, key=comparison.dev)
    lines = [("against", *GROUPS)]
    ahead: list[bool] = []
    missing = False
    for row in causal:
        found = [comparison.difference(best, row, group) for group in GROUPS]
        missing = missing or None in found
        ahead += [low > 0 for _, low, _ in filter(None, found)]
        lines.append((row.name, *map(difference_cell, found)))
    verdict = "not reached" if not all(ahead) else "not all of it is measured" if missing else "reached"
    return (
        f"The bidirectional row that is best on STS-B dev is: {best.name}. Its difference to each causal row, with the 95 % "
        f"interval of the same draws:\n\n{markdown(lines)}\n\n"
        f"Goal: above each causal row on each set, with the interval above 0: {verdict}."
    )


def write_contrasts(comparison: Comparison) -> str:
    """The rows that differ in their attention alone, and those that differ in MNTP alone, with the interval of the same draws."""
    rows = {row.name: row for row in comparison.results}
    lines = [("difference", *GROUPS)]
    for name, row in rows.items():
        if not row.bidirectional or row.ceiling:
            continue
        causal = name.replace("bidirectional", "causal").removesuffix(", untrained")
        plain = name.replace(" + MNTP", "") if name != "bidirectional + MNTP" else "bidirectional, untrained"
        for other in dict.fromkeys([causal, plain]):
            if other in rows and other != name:
                found = [comparison.difference(row, rows[other], group) for group in GROUPS]
                lines.append((f"{name}, minus {other}", *map(difference_cell, found)))
    return markdown(lines) if len(lines) > 1 else ""


def write_depths(comparison: Comparison) -> str:
    """What the mean of the tokens gives on the development set after so many layers, for the rows that keep all layers."""
    whole = [row for row in comparison.results if row.whole]
    if not whole:
        return ""
    layers = sorted({way.layer for row in whole for way in comparison.results[row][0][DEV]})
    lines = [("STS-B dev, mean, after layer", *map(str, layers))]
    for row in whole:
        values = (comparison.value_on_dev(row, Way(layer, POOLINGS[0], False)) for layer in layers)
        lines.append((row.name, *(f"{value:.1f}" for value in values)))
    return markdown(lines)
