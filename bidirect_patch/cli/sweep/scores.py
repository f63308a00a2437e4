"""How well embeddings agree with people's scores: Spearman's correlation, and how sure it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..spearman import spearman
from .texts import Pairs

DRAWS = 1000


def cosines(embeddings: np.ndarray, pairs: Pairs, chosen: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """The cosine of the embeddings of each pair.

    Args:
        embeddings: (texts, width), float32.
        pairs: The pairs.
        chosen: Which pairs.
        centre: What is subtracted from each embedding, (width,).

    Returns:
        (chosen pairs,), float64; NaN where an embedding is zero or no number.
    """
    one, two = (embeddings[side[chosen]].astype(np.float64) for side in (pairs.first, pairs.second))
    if centre is not None:
        one, two = one - centre, two - centre
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = (one * two).sum(1) / np.sqrt((one**2).sum(1) * (two**2).sum(1))
    rounded: np.ndarray = found.round(12)  # pairs of equal texts have equal ranks
    return rounded


class Interval(NamedTuple):
    """A number and the middle 95 % of what other draws of the pairs give."""

    value: float
    low: float
    high: float

    def __format__(self, sign: str) -> str:
        """In words; with "+", numbers above 0 have a sign."""
        return f"{self.value:{sign}.1f} [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"


class Bootstrap:
    """100 times Spearman's correlation, and how it differs between draws of the pairs, the same draws for every setup.

    Args:
        scores: What people say of each pair, (pairs,), float64.
    """

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores
        generator = np.random.default_rng(0)
        self.draws = [generator.integers(len(scores), size=len(scores)) for _ in range(DRAWS)]

    def drawn(self, cosines: np.ndarray) -> np.ndarray:
        """The correlation with all pairs, and with each draw: (1 + draws,), float64."""
        draws = (np.arange(len(self.scores)), *self.draws)
        return 100 * np.array([spearman(cosines[draw], self.scores[draw]) for draw in draws])


def interval(drawn: np.ndarray) -> Interval:
    """What `Bootstrap.drawn` gives, or the difference of two such, as a number and its interval."""
    usable: Sequence[float] = drawn[1:][np.isfinite(drawn[1:])]  # a draw may hold one pair alone
    low, high = np.percentile(usable, [2.5, 97.5]) if len(usable) else (np.nan, np.nan)
    return Interval(float(drawn[0]), float(low), float(high))
