"""Pairs of sentences: Spearman's correlation of cosines with people's scores.

Each row is read in the way (first token, depth, pooling, centring) that is best on the pairs to choose on.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.ladder.opened import Opened, open_row
from benchmarks.ladder.rows import UNTRAINED, UPPER, Row
from benchmarks.ladder.training import Plan, trained
from bidirect_patch.cli.simcse.saved_encoder import open_encoder
from bidirect_patch.cli.sink_token import candidates, first_token
from bidirect_patch.cli.spearman import spearman
from bidirect_patch.cli.sweep.encode import Embeddings
from bidirect_patch.cli.sweep.measure import Row as Measured
from bidirect_patch.cli.sweep.measure import best_rows, encode, first_tokens, measure, sweep
from bidirect_patch.cli.sweep.parts import called_by, state_of
from bidirect_patch.cli.sweep.passes import Depth, attending
from bidirect_patch.cli.sweep.scores import cosines
from bidirect_patch.cli.sweep.setups import CAUSAL, SINK
from bidirect_patch.cli.sweep.steps import tokens_by_first_token
from bidirect_patch.cli.sweep.table import in_words
from bidirect_patch.cli.sweep.texts import Pairs, with_first_token

Sets = Mapping[str, Pairs]
STARTS = (1 / 6, 1 / 3, 1 / 2, 2 / 3)  # of the layers, from which on attention is opened in the row UPPER


def measured(plan: Plan, row: Row, dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The result of a row: for each of its lines how it is read, its value on `dev`, and the cosines of all pairs."""
    if "teacher" in row.steps:
        return _as_saved(trained(plan, row)["teacher"], dev, sets)
    opened = open_row(plan, row)
    if row.attention == UPPER:
        return {"": _upper(opened, plan.first_token, dev, sets)}
    return read(opened, row, dev, sets)


def read(opened: Opened, row: Row, dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The lines of an opened model of a row, each in its best way."""
    family = opened.attention.family
    tried = first_tokens(first_token(opened.tokenizer), candidates(opened.tokenizer))[family]
    tokenizers = {token: with_first_token(opened.tokenizer, token) for token in tried}
    found, notes = sweep(opened.parts, tokens_by_first_token(tokenizers, dev, opened.limit), {family: tried}, dev)
    if not found:
        raise SystemExit(f"{row}: {'; '.join(notes)}")
    values = [spearman(each.cosines, dev.scores) for each in found]
    # Untrained, each attention is a line of its own; trained, hiding the first token from the last layers is one more choice.
    wanted = found if row.recipe == UNTRAINED else [found[int(np.argmax(values))]]
    on_sets = {
        name: measure(opened.parts, tokens_by_first_token(tokenizers, pairs, opened.limit), wanted, pairs)
        for name, pairs in sets.items()
    }
    lines = {}
    for place, each in enumerate(wanted):
        name = str(each.setup.attention) if row.recipe == UNTRAINED else ""
        how = in_words(each.setup, len(opened.parts.layers))
        if row.recipe != UNTRAINED and each.setup.attention.blind:
            how += f", first token hidden from the last {each.setup.attention.blind}"
        lines[name] = _line(how, each, dev, {key: rows[place].cosines for key, rows in on_sets.items()})
    return lines


def _line(how: str, row: Measured, dev: Pairs, on_sets: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "how": how,
        "dev": round(100 * spearman(row.cosines, dev.scores), 2),
        "first token": row.setup.first_token,
        "layers": row.setup.layers,
        "cosines": {name: values.round(6).tolist() for name, values in on_sets.items()},
    }


class UpperOpened(Embeddings):
    """Embeddings of a model whose lower layers are causal; in the upper ones no token sees the first one, and attention is open.

    Args:
        *args: Those of Embeddings.
        start: How many layers are causal.
    """

    def __init__(self, *args: Any, start: int) -> None:
        super().__init__(*args)
        self.start = start

    def states(self, ids: Tensor, mask: Tensor) -> Iterator[tuple[Depth, Tensor]]:
        """The states at each depth above the causal layers."""
        found: dict[int, Any] = {}

        def lower(index: int, forward: Any, args: Any, kwargs: Any) -> Any:
            if index < self.start:
                found[self.start] = forward(*args, **kwargs)
            return found[self.start]

        def upper(index: int, forward: Any, args: Any, kwargs: Any) -> Any:
            if index >= self.start:
                found[index + 1] = forward(*args, **kwargs)
            return found[max(index + 1, self.start)]

        for attention, call in ((CAUSAL, lower), (SINK._replace(blind=1), upper)):
            with attending(self.parts, attention), called_by(self.parts.layers, call):
                self.parts.model(input_ids=ids, attention_mask=mask)
        for depth in self.depths:
            yield depth, self.parts.embeddings_of(state_of(found[depth.layers]))


def _upper(opened: Opened, token: str, dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The row UPPER, in its best way: where the causal layers end, where the model does, and the pooling."""
    if opened.parts.after is None:
        raise SystemExit(f"{UPPER}: it is not known what follows the last layer of this model")
    layers = len(opened.parts.layers)
    own = first_token(opened.tokenizer)
    first = None if own else token
    tokenizers = {first: with_first_token(opened.tokenizer, first)}

    def embedded(pairs: Pairs, start: int, ends: Any) -> Embeddings:
        ids = tokens_by_first_token(tokenizers, pairs, opened.limit)[first]
        embeddings = UpperOpened(opened.parts, SINK, ids, first, [Depth(0, end) for end in ends], start=start)
        encode(embeddings, np.arange(len(pairs.texts)), UPPER)
        return embeddings

    best: tuple[float, int, Measured] | None = None
    for start in sorted({max(1, round(layers * part)) for part in STARTS}):
        (row,) = best_rows(embedded(dev, start, range(start + 1, layers + 1)), dev)
        value = spearman(row.cosines, dev.scores)
        if best is None or value > best[0]:
            best = value, start, row
    assert best is not None
    _, start, row = best
    setup, on_sets = row.setup, {}
    for name, pairs in sets.items():
        embeddings = embedded(pairs, start, [setup.layers])
        vectors = embeddings.of(Depth(0, setup.layers))[embeddings.poolings.index(setup.pooling)]
        on_sets[name] = cosines(vectors, pairs, np.arange(len(pairs.scores)), row.centre if setup.centred else None)
    return _line(f"{in_words(setup, layers)}, the first {start} causal", row, dev, on_sets)


def _as_saved(folder: str, dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The line of an encoder that is read as it was saved."""
    model = open_encoder(folder)

    def of(pairs: Pairs) -> np.ndarray:
        vectors = model.encode(list(pairs.texts), show_progress_bar=False)
        return cosines(vectors, pairs, np.arange(len(pairs.scores)))

    return {
        "": {
            "how": "as it was saved",
            "dev": round(100 * spearman(of(dev), dev.scores), 2),
            "cosines": {name: of(pairs).round(6).tolist() for name, pairs in sets.items()},
        }
    }


def teacher_line(folder: str, dev: Pairs, sets: Sets) -> dict[str, Any]:
    """The line of the teacher itself."""
    return _as_saved(folder, dev, sets)
