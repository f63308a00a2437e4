"""What was measured of each row: the cosine of every pair in every way, in one file for each row and seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.ladder.encode import POOLINGS, Way
from benchmarks.ladder.plan import Row
from benchmarks.ladder.statistics import correlations
from benchmarks.ladder.texts import DEV

Cosines = Mapping[str, Mapping[Way, np.ndarray]]  # by set, then by way: (pairs,)


def result_file(work: Path, row: Row, seed: int) -> Path:
    """Where a row's cosines are kept."""
    return work / "cosines" / f"{row.name}, {seed}.npz"


def save(path: Path, cosines: Cosines) -> None:
    """Write them, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{name}|{way.layer}|{way.pooling}|{int(way.centred)}": values.astype(np.float32)
        for name, ways in cosines.items()
        for way, values in ways.items()
    }
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(path)


def load(path: Path) -> dict[str, dict[Way, np.ndarray]]:
    """Read them."""
    found: dict[str, dict[Way, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, layer, pooling, centred = key.split("|")
            found.setdefault(name, {})[Way(int(layer), pooling, centred == "1")] = arrays[key].astype(np.float64)
    return found


def plain_way(results: Sequence[Cosines]) -> Way:
    """The mean of the last layer's tokens."""
    return Way(max(way.layer for way in results[0][DEV]), POOLINGS[0], False)


def best_way(results: Sequence[Cosines], scores: np.ndarray) -> Way:
    """The way with the highest correlation on the development set, on average over seeds."""
    ways = list(results[0][DEV])
    means = [correlations(np.stack([result[DEV][way] for result in results]), scores).mean() for way in ways]
    return ways[int(np.argmax(means))]


def gathered(results: Sequence[Cosines], way: Way, names: Sequence[str]) -> list[np.ndarray] | None:
    """For each set the cosines of every seed that was measured on it, (seeds, pairs); None where a set has none."""
    found = []
    for name in names:
        rows = [result[name][way] for result in results if name in result]
        if not rows:
            return None
        found.append(np.stack(rows))
    return found
