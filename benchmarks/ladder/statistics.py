"""Spearman's correlation, and how sure a difference of two is."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

DRAWS = 1000


def correlations(cosines: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """100 times Spearman's correlation of rows of cosines with scores.

    Args:
        cosines: (rows, pairs), float64.
        scores: (pairs,), float64.

    Returns:
        (rows,), float64.
    """
    ranks = rankdata(cosines, axis=1)
    wanted = rankdata(scores)
    ranks -= ranks.mean(1, keepdims=True)
    wanted -= wanted.mean()
    return 100 * ranks @ wanted / np.sqrt((ranks**2).sum(1) * (wanted**2).sum())


def mean_correlation(cosines: Sequence[np.ndarray], sets: Sequence[np.ndarray]) -> float:
    """The mean over seeds, then over sets, of `correlations`.

    Args:
        cosines: For each set (seeds, pairs).
        sets: The scores of each set, (pairs,).
    """
    return float(np.mean([correlations(c, scores).mean() for c, scores in zip(cosines, sets, strict=True)]))


class Bootstrap:
    """The same draws of pairs for every row, so that two rows can be compared draw by draw.

    Args:
        sets: The scores of each set, (pairs,) each. A value is the mean over sets.
        draws: How many.
    """

    def __init__(self, sets: Sequence[np.ndarray], draws: int = DRAWS) -> None:
        self.sets = list(sets)
        generator = np.random.default_rng(0)
        self.chosen = [[generator.integers(len(scores), size=len(scores)) for scores in self.sets] for _ in range(draws)]

    def values(self, cosines: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """The value of one row, and its value in each draw. Several seeds are averaged.

        Args:
            cosines: For each set (seeds, pairs).

        Returns:
            The value; (draws,), float64.
        """
        drawn = [
            mean_correlation([c[:, i] for c, i in zip(cosines, chosen)], [s[i] for s, i in zip(self.sets, chosen)])
            for chosen in self.chosen
        ]
        return mean_correlation(cosines, self.sets), np.array(drawn)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the draws."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
