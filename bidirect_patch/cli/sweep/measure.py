"""The sweep itself: every setup on the pairs, and the best one of each attention."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ...errors import UnsupportedModelError
from ..spearman import spearman
from .encode import Embeddings
from .parts import Parts
from .passes import Depth
from .scores import cosines
from .setups import BLIND, CAUSAL, OPEN, SINK, Attention, Setup
from .texts import Pairs

SCREENING = 64  # pairs that tell the better half of the first tokens, and the depths that are near the best
MARGIN = 0.1  # a depth that is so far below the best one on these pairs is not measured on more pairs

# The tokens of the texts by what stands before each text.
Tokens = Mapping[str | None, Sequence[Sequence[int]]]


class Row(NamedTuple):
    """A setup that was measured.

    Attributes:
        setup: The setup.
        centre: The mean of the embeddings of the texts, (width,), float64.
        cosines: Of all pairs, (pairs,), float64.
    """

    setup: Setup
    centre: np.ndarray
    cosines: np.ndarray


def first_tokens(own: str | None, candidates: Sequence[str]) -> dict[Attention, list[str | None]]:
    """The first tokens that are tried with each family; None leaves the tokenizer as it is.

    Args:
        own: What the tokenizer puts before each text by itself.
        candidates: What can be put there.
    """
    if own is not None:
        return {family: [None] for family in BLIND}
    # A sink token is one that is put there: `mntp` and `simcse` take the first word of a text for none.
    return {CAUSAL: [None, *candidates], OPEN: [None, *candidates], SINK: list(candidates)}


def sweep(
    parts: Parts, tokens: Tokens, tried: Mapping[Attention, Sequence[str | None]], pairs: Pairs
) -> tuple[list[Row], list[str]]:
    """Measure every setup.

    All first tokens are compared by their best setups on a part of the pairs, the better half of them (two at least) on all.
    Depths that are far from the best on the part are left out.

    Args:
        parts: The model.
        tokens: The tokens of the texts.
        tried: The first tokens that are tried with each family.
        pairs: The pairs.

    Returns:
        The best setup of each attention; and what could not be measured, in words.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for family, first in tried.items():
        if not first:
            notes.append(f"{family}: not measured, since the tokenizer has no special token to put first")
            continue
        try:
            embeddings = _choose_first_token(parts, family, tokens, first, pairs)
            encode(embeddings, pairs.texts_of(np.arange(len(pairs.scores))), str(family))
        except UnsupportedModelError as error:
            if not family.sinks:
                raise
            notes.append(f"{family}: not measured, {error}")
            continue
        rows += best_rows(embeddings, pairs)
    return rows, notes


def measure(parts: Parts, tokens: Tokens, rows: Sequence[Row], pairs: Pairs) -> list[Row]:
    """Measure chosen setups on other pairs.

    Args:
        parts: The model.
        tokens: The tokens of the texts of these pairs.
        rows: The chosen setups, with the centres that they are measured with.
        pairs: The pairs.

    Returns:
        The same setups with the cosines of these pairs.
    """
    everything = np.arange(len(pairs.scores))
    found: dict[Setup, Row] = {}
    for family, token in dict.fromkeys((row.setup.attention.family, row.setup.first_token) for row in rows):
        group = [row for row in rows if (row.setup.attention.family, row.setup.first_token) == (family, token)]
        depths = {_depth(row.setup) for row in group}
        embeddings = Embeddings(parts, family, tokens[token], token, depths)
        encode(embeddings, pairs.texts_of(everything), f"{family}: other pairs")
        for row in group:
            at = embeddings.poolings.index(row.setup.pooling)
            centre = row.centre if row.setup.centred else None
            values = cosines(embeddings.of(_depth(row.setup))[at], pairs, everything, centre)
            found[row.setup] = row._replace(cosines=values)
    return [found[row.setup] for row in rows]


def _depths(parts: Parts, family: Attention) -> list[Depth]:
    """Where the model is cut, and with how many blind layers. Sinks form in the lower third, where none is tried."""
    layers = len(parts.layers)
    ends = range(layers, layers + 1) if parts.after is None else range(1, layers + 1)
    return [
        Depth(blind, end)
        for blind in range(BLIND[family] + 1)
        for end in ends
        if not blind or end >= max(blind, layers // 3 + 1)
    ]


def _depth(setup: Setup) -> Depth:
    return Depth(setup.attention.blind, setup.layers)


def _choose_first_token(
    parts: Parts, family: Attention, tokens: Tokens, first: Sequence[str | None], pairs: Pairs
) -> Embeddings:
    """The embeddings with the best of some first tokens, at the depths that are left. Not all texts are encoded yet."""
    tried = [Embeddings(parts, family, tokens[token], token, _depths(parts, family)) for token in first]
    tried = _best_first(tried, pairs, pairs.some(SCREENING))[: max(2, len(tried) // 2)]
    return tried[0] if len(tried) == 1 else _best_first(tried, pairs, np.arange(len(pairs.scores)))[0]


def _best_first(tried: Sequence[Embeddings], pairs: Pairs, chosen: np.ndarray) -> list[Embeddings]:
    """Some embeddings, in the order of their best setups on some pairs. They keep the depths that are promising there."""
    best: dict[Embeddings, float] = {}
    promising = tried[0].depths  # of the best so far
    for each in tried:
        each.keep(_among(each.depths, promising))
        encode(each, pairs.texts_of(chosen), f"{each.family}, {each.token or 'no token'} first")
        values = _best_by_depth(each, pairs, chosen)
        each.keep(_promising(values))
        if max(values.values()) > max(best.values(), default=-np.inf):
            promising = each.depths
        best[each] = max(values.values())
    return sorted(best, key=lambda each: -best[each])


def _among(depths: Sequence[Depth], promising: Sequence[Depth]) -> list[Depth]:
    """Those that are promising; with a number of blind layers of which none is, all of them."""
    known = {depth.blind for depth in depths if depth in promising}
    return [depth for depth in depths if depth in promising or depth.blind not in known]


def _best_by_depth(embeddings: Embeddings, pairs: Pairs, chosen: np.ndarray) -> dict[Depth, float]:
    best: dict[Depth, float] = {}
    for value, depth, *_ in _values(embeddings, pairs, chosen):
        best[depth] = max(value, best.get(depth, value))
    return best


def _promising(values: Mapping[Depth, float]) -> list[Depth]:
    """The depths that are near the best one with as many blind layers."""
    best = {blind: max(value for depth, value in values.items() if depth.blind == blind) for blind in {d.blind for d in values}}
    return [depth for depth, value in values.items() if value >= best[depth.blind] - MARGIN]


def encode(embeddings: Embeddings, texts: np.ndarray, what: str) -> None:
    """Encode texts, with a progress bar, which is not shown where stderr is no terminal."""
    total = len(embeddings.lacking(texts))
    with tqdm(total=total, desc=what, unit=" texts", leave=False, dynamic_ncols=True, disable=None) as bar:
        embeddings.add(texts, bar.update)


def best_rows(embeddings: Embeddings, pairs: Pairs) -> list[Row]:
    """The best setup of each attention of one family."""
    best: dict[Attention, tuple[float, Row]] = {}
    for value, depth, pooling, centre, is_centred, row in _values(embeddings, pairs, np.arange(len(pairs.scores))):
        attention = embeddings.family._replace(blind=depth.blind)
        if attention not in best or value > best[attention][0]:
            setup = Setup(attention, embeddings.token, depth.layers, embeddings.poolings[pooling], is_centred)
            best[attention] = value, Row(setup, centre, row)
    return [row for _, row in best.values()]


def _values(embeddings: Embeddings, pairs: Pairs, chosen: np.ndarray) -> Iterator[tuple[float, Depth, int, Any, bool, Any]]:
    """Each setup on some pairs: its correlation, -inf where there is none; how it is made; and its centre and cosines."""
    texts = pairs.texts_of(chosen)
    for depth in embeddings.depths:
        for pooling, rows in enumerate(embeddings.of(depth)):
            centre = rows[texts].mean(0, dtype=np.float64)
            for is_centred in (False, True):
                row = cosines(rows, pairs, chosen, centre if is_centred else None)
                value = spearman(row, pairs.scores[chosen])
                yield value if np.isfinite(value) else -np.inf, depth, pooling, centre, is_centred, row
