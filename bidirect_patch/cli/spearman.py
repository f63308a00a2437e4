"""Spearman's correlation, without scipy, which the commands do not need otherwise."""

import numpy as np


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Spearman's correlation of two rows of numbers, each (n,): Pearson's correlation of their ranks.

    Returns:
        The correlation; NaN where a number is not finite or all numbers of a row are equal.
    """
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        return float("nan")
    ranks = np.stack([_ranks(one), _ranks(two)])
    ranks -= ranks.mean(1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(1)).prod()
    return float(ranks.prod(0).sum() / scale) if scale else float("nan")


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """The rank of each number from 1 on, float64. Equal numbers share the mean of their ranks."""
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: np.ndarray = ((2 * last - counts + 1) / 2)[places]
    return ranks
