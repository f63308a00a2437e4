"""Questions and paragraphs: at which rank is the paragraph that answers the question, by one vector and by MaxSim.

The depth, the pooling and whether vectors are centred are chosen on questions of every other article, and reported on the others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import similarity
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from benchmarks.ladder.opened import Opened, open_row
from benchmarks.ladder.rows import Row
from benchmarks.ladder.texts import Questions
from benchmarks.ladder.training import Plan
from bidirect_patch.cli.sink_token import first_token
from bidirect_patch.cli.sweep.encode import pooling_weights
from bidirect_patch.cli.sweep.setups import MODES, Pooling
from bidirect_patch.cli.sweep.texts import token_ids, with_first_token

TO_CHOOSE = 200  # questions at most
CUTOFF = 10  # of the mean reciprocal rank
AT_A_TIME = 40  # texts of each side

# By depth: the states of each text's tokens after the first one, (tokens, width).
States = Mapping[int, list[Tensor]]


def measured(plan: Plan, row: Row, data: Questions) -> dict[str, Any]:
    """The result of a row: for one vector and for MaxSim how it is read, its value where it was chosen, and the other ranks."""
    opened = open_row(plan, row)
    asked, paragraphs = (_states(opened, plan.first_token, texts) for texts in (data.questions, data.paragraphs))
    choose, report = np.flatnonzero(data.to_choose)[:TO_CHOOSE], np.flatnonzero(~data.to_choose)
    lines = {}
    for name, ways in (("one vector", _by_one_vector), ("MaxSim", _by_maxsim)):
        best: tuple[float, str, Any] | None = None
        for how, scores in ways(asked, paragraphs, choose):
            value = reciprocal(ranks(scores(choose), data.answers[choose])).mean()
            if best is None or value > best[0]:
                best = value, how, scores
        assert best is not None
        found = ranks(best[2](report), data.answers[report])
        how = f"{best[1]} of {len(opened.parts.layers)} layers"
        lines[name] = {"how": how, "to choose": round(100 * float(best[0]), 2), "ranks": found.tolist()}
    return lines


def ranks(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The rank of the right paragraph for each question, from 1 on, (questions,). Of equal scores, the right one is the last.

    Args:
        scores: (questions, paragraphs).
        answers: The right paragraph of each question, (questions,).
    """
    right = scores[np.arange(len(scores)), answers][:, None]
    found: np.ndarray = (scores >= right).sum(1)
    return found


def reciprocal(found: np.ndarray) -> np.ndarray:
    """One over each rank; 0 beyond CUTOFF."""
    return np.where(found <= CUTOFF, 1 / found, 0)


def _states(opened: Opened, token: str, texts: list[str]) -> States:
    tokenizer = with_first_token(opened.tokenizer, None if first_token(opened.tokenizer) else token)
    ids = token_ids(tokenizer, texts, opened.limit)
    found: dict[int, list[Any]] = {depth.layers: [None] * len(ids) for depth in opened.depths}
    for batch, depth, state in opened.token_states(ids):
        for text, row in zip(batch, state):
            found[depth.layers][text] = row[1 : len(ids[text])] if len(ids[text]) > 1 else row[:1]
    return found


def _by_one_vector(asked: States, paragraphs: States, choose: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Each way, and what gives its scores for some questions."""
    for depth in asked:
        for mode in MODES:
            one, two = (torch.stack([_pooled(t, mode) for t in side[depth]]) for side in (asked, paragraphs))
            for centred in (False, True):
                # Questions and paragraphs are of different kinds: each has its own centre.
                a, b = (one - one[choose].mean(0), two - two.mean(0)) if centred else (one, two)
                a, b = normalize(a, dim=-1), normalize(b, dim=-1)
                how = f"{mode.replace('_', ' ')}{', centred' if centred else ''}, {depth}"
                yield how, lambda chosen, a=a, b=b: (a[chosen] @ b.T).numpy()


def _pooled(states: Tensor, mode: Any) -> Tensor:
    return pooling_weights(torch.ones(1, len(states), dtype=torch.int64), Pooling(mode, True))[0] @ states


def _by_maxsim(asked: States, paragraphs: States, choose: np.ndarray) -> Iterator[tuple[str, Any]]:
    for depth in asked:
        for centred in (False, True):
            centre = torch.cat(paragraphs[depth]).mean(0) if centred else 0.0
            one, two = ([normalize(t - centre, dim=-1) for t in side[depth]] for side in (asked, paragraphs))
            yield f"{'centred, ' if centred else ''}{depth}", lambda chosen, a=one, b=two: _maxsim([a[i] for i in chosen], b)


def _maxsim(one: list[Tensor], two: list[Tensor]) -> np.ndarray:
    """sentence-transformers' MaxSim of each text with each other one, (texts, other texts); some at a time, alike in length."""
    found = np.empty((len(one), len(two)), dtype=np.float32)
    rows, columns = (sorted(range(len(side)), key=lambda i, side=side: len(side[i])) for side in (one, two))
    for row in (rows[i : i + AT_A_TIME] for i in range(0, len(rows), AT_A_TIME)):
        a, a_mask = _padded([one[i] for i in row])
        for column in (columns[i : i + AT_A_TIME] for i in range(0, len(columns), AT_A_TIME)):
            b, b_mask = _padded([two[i] for i in column])
            found[np.ix_(row, column)] = similarity.maxsim(a, b, a_mask=a_mask, b_mask=b_mask).numpy()
    return found


def _padded(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    mask = pad_sequence([torch.ones(len(rows), dtype=torch.bool) for rows in states], batch_first=True)
    return pad_sequence(states, batch_first=True), mask
