"""What the sweep says at its end."""

from collections.abc import Mapping, Sequence

import numpy as np

from .measure import Row
from .scores import Bootstrap, interval
from .setups import CAUSAL, Setup
from .texts import Pairs


def best_of(rows: Sequence[Row], pairs: Pairs) -> Row:
    """The row with the highest correlation of those whose setup can be saved."""
    drawn = {row.setup: Bootstrap(pairs.scores, draws=0).drawn(row.cosines)[0] for row in rows}
    return max((row for row in rows if row.setup.attention.can_be_saved), key=lambda row: drawn[row.setup])


def in_words(setup: Setup, layers: int) -> str:
    """How a setup makes an embedding."""
    first = "tokenizer as it is" if setup.first_token is None else f"{setup.first_token} put first"
    return f"{first}, {setup.layers} of {layers} layers, {setup.pooling}{', centred' if setup.centred else ''}"


def table(measured: Mapping[str, tuple[Sequence[Row], Pairs]], layers: int) -> str:
    """A line of numbers for each attention, and a line that says how it was reached.

    Args:
        measured: The rows and the pairs of each file; in the first one the setups were chosen.
        layers: How many layers the model has.
    """
    columns = []
    for name, (rows, pairs) in measured.items():
        bootstrap = Bootstrap(pairs.scores)
        drawn = [bootstrap.drawn(row.cosines) for row in rows]
        causal = next(each for each, row in zip(drawn, rows) if row.setup.attention == CAUSAL)
        more = ["" if each is causal else f"{interval(each - causal):+}" for each in drawn]
        columns += [[name, *(f"{interval(each):}" for each in drawn)], ["more than causal", *more]]
    chosen = [row.setup for row in next(iter(measured.values()))[0]]
    names = ["", *(str(setup.attention) for setup in chosen)]
    widths = [max(map(len, column)) for column in (names, *columns)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths)).rstrip() for cells in zip(names, *columns)]
    below = ["", *(f"    {in_words(setup, layers)}" for setup in chosen)]
    return "\n".join(line for both in zip(lines, below) for line in both if line)


def is_sure(best: Row, rows: Sequence[Row], pairs: Pairs) -> bool:
    """Whether other draws of the pairs would put this row above the causal one too."""
    bootstrap = Bootstrap(pairs.scores)
    causal = next(row for row in rows if row.setup.attention == CAUSAL)
    return bool(np.isfinite(low := interval(bootstrap.drawn(best.cosines) - bootstrap.drawn(causal.cosines)).low) and low > 0)
