"""The table of results that `sweep` prints."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..spearman import spearman
from .measure import Row
from .scores import Bootstrap, interval
from .setups import CAUSAL, Setup
from .texts import Pairs


def best_of(rows: Sequence[Row], pairs: Pairs) -> Row:
    """The row with the highest correlation of those whose setup can be saved."""
    saved = [row for row in rows if row.setup.attention.can_be_saved and np.isfinite(row.cosines).all()]
    return max(saved, key=lambda row: spearman(row.cosines, pairs.scores))


def drawn(rows: Sequence[Row], pairs: Pairs) -> list[np.ndarray]:
    """For each row, what `Bootstrap.drawn` gives; the draws are the same for all."""
    bootstrap = Bootstrap(pairs.scores)
    return [bootstrap.drawn(row.cosines) for row in rows]


def in_words(setup: Setup, layers: int) -> str:
    """How a setup makes an embedding."""
    first = "tokenizer as it is" if setup.first_token is None else f"{setup.first_token} put first"
    return f"{first}, {setup.layers} of {layers} layers, {setup.pooling}{', centred' if setup.centred else ''}"


def table(rows: Sequence[Row], files: Mapping[str, Sequence[np.ndarray]], layers: int) -> str:
    """A line of numbers for each attention, and a line that says how it was reached.

    Args:
        rows: The chosen setups.
        files: For each file, what `drawn` gives for them.
        layers: How many layers the model has.
    """
    causal = _causal(rows)
    columns = []
    for name, values in files.items():
        more = ["" if each is values[causal] else f"{interval(each - values[causal]):+}" for each in values]
        columns += [[name, *(f"{interval(each):}" for each in values)], ["more than causal", *more]]
    names = ["", *(str(row.setup.attention) for row in rows)]
    widths = [max(map(len, column)) for column in (names, *columns)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths)).rstrip() for cells in zip(names, *columns)]
    below = ["", *(f"    {in_words(row.setup, layers)}" for row in rows)]
    return "\n".join(line for both in zip(lines, below) for line in both if line)


def is_sure(best: Row, rows: Sequence[Row], values: Sequence[np.ndarray]) -> bool:
    """Whether other draws of the pairs would put this row above the causal one too.

    Args:
        best: One of the rows.
        rows: The chosen setups.
        values: What `drawn` gives for them.
    """
    place = next(i for i, row in enumerate(rows) if row is best)
    return bool(interval(values[place] - values[_causal(rows)]).low > 0)  # false for NaN


def _causal(rows: Sequence[Row]) -> int:
    return next(i for i, row in enumerate(rows) if row.setup.attention == CAUSAL)
