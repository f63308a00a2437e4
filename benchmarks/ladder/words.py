"""Tags of words, read from frozen states by a linear probe: part of speech, relation, direction of the head, names.

The probe, a logistic regression, is fitted on sentences of the development part. A part of these is held out: on it the depth and
the readout are chosen. Then the probe is fitted on all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.ladder.opened import Opened, open_row
from benchmarks.ladder.rows import CAUSAL_ROW, UNTRAINED, Row
from benchmarks.ladder.texts import TASKS, Sentence
from benchmarks.ladder.training import Plan
from bidirect_patch.cli.sink_token import first_token
from bidirect_patch.cli.sweep.texts import token_ids, with_first_token

HELD_OUT = 0.3  # of the sentences to fit on
READOUTS = {"word": (0,), "before": (-1,), "both": (-1, 0)}  # places from the word's last token on
LOOKAHEAD = {"word and next": (0, 1), "before, word and next": (-1, 0, 1)}  # a control, of the causal model
NEXT = "causal + next state"
STRENGTH = 0.01  # C of the logistic regression, on standardized states


class Words(NamedTuple):
    """The words of many sentences.

    Attributes:
        sentence: The sentence of each word, (words,).
        place: Its last token among the tokens of all sentences, (words,).
        begins, ends: The first token of its sentence and the last one, (words,).
        ids: The tokens of each sentence.
    """

    sentence: np.ndarray
    place: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    ids: list[list[int]]


def measured(plan: Plan, row: Row, fit: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, Any]:
    """The result of a row: for each of its lines and each task how it is read, its value held out, and the counts of `counts`."""
    opened = open_row(plan, row)
    both = [*fit, *test]
    words = _words(opened, plan.first_token, both)
    states = _token_states(opened, words)
    is_test = words.sentence >= len(fit)
    held_out = (words.sentence >= len(fit) * (1 - HELD_OUT)) & ~is_test
    lines = {"": READOUTS}
    if row.recipe == UNTRAINED and row.attention == CAUSAL_ROW:
        lines[NEXT] = LOOKAHEAD
    results: dict[str, Any] = {name: {} for name in lines}
    for name, readouts in lines.items():
        tried = _screened(states, words, readouts, both, ~is_test & ~held_out, held_out)
        for task in TASKS:
            known = [value for value in tried if task in value[2]]
            if not known:
                continue
            depth, readout, values = max(known, key=lambda each: each[2][task])
            features = _features(states[depth], words, readouts[readout])
            results[name][task] = {
                "how": f"{readout}, {depth} of {len(opened.parts.layers)} layers",
                "held out": round(values[task], 2),
                "tried": {f"{each[1]}, {each[0]}": round(each[2][task], 2) for each in known},
                "counts": _probed(features, words, _labels(both, task), task, ~is_test, is_test).tolist(),
            }
    return results


def _words(opened: Opened, token: str, sentences: Sequence[Sentence]) -> Words:
    tokenizer = with_first_token(opened.tokenizer, None if first_token(opened.tokenizer) else token)
    texts = [sentence.text for sentence in sentences]
    ids = token_ids(tokenizer, texts, opened.limit)
    offsets = tokenizer(texts, return_offsets_mapping=True, truncation=True, max_length=max(map(len, ids)))["offset_mapping"]
    rows, start = [], 0
    for number, (sentence, row, places) in enumerate(zip(sentences, ids, offsets)):
        last = start
        for begin, end in sentence.spans:
            inside = [i for i, (a, b) in enumerate(places) if a < end and b > begin]
            last = start + inside[-1] if inside else last  # a text that was cut
            rows.append((number, last, start, start + len(row) - 1))
        start += len(row)
    return Words(*np.array(rows).T, ids)


def _token_states(opened: Opened, words: Words) -> dict[int, np.ndarray]:
    """The states of all tokens by depth, (tokens, width), float32."""
    begins = np.cumsum([0, *map(len, words.ids)])
    found: dict[int, np.ndarray] = {}
    for batch, depth, state in opened.token_states(words.ids):
        rows = found.setdefault(depth.layers, np.zeros((begins[-1], state.shape[-1]), dtype=np.float32))
        for text, row in zip(batch, state.numpy()):
            rows[begins[text] : begins[text + 1]] = row[: len(words.ids[text])]
    return found


def _features(states: np.ndarray, words: Words, places: Sequence[int]) -> np.ndarray:
    """(words, width of all places), float32. A place outside of the sentence is its first or last token."""
    return np.concatenate([states[np.clip(words.place + place, words.begins, words.ends)] for place in places], axis=1)


def _labels(sentences: Sequence[Sentence], task: str) -> np.ndarray:
    """The label of each word, (words,), str; empty where it is not known."""
    return np.array([label for s in sentences for label in s.labels.get(task, [""] * len(s.spans))])


def _screened(
    states: Mapping[int, np.ndarray], words: Words, readouts: Mapping[str, Sequence[int]], sentences: Sequence[Sentence],
    fit: np.ndarray, held_out: np.ndarray,
) -> list[tuple[int, str, dict[str, float]]]:
    """For each depth and readout the value of each task on held-out sentences."""
    found = []
    for depth, rows in states.items():
        for readout, places in readouts.items():
            features = _features(rows, words, places)
            tried = {task: _probed(features, words, _labels(sentences, task), task, fit, held_out) for task in TASKS}
            found.append((depth, readout, {task: score(each) for task, each in tried.items() if len(each)}))
    return found


def _probed(
    features: np.ndarray, words: Words, labels: np.ndarray, task: str, fit: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """What `counts` gives for some words under a probe that is fitted on others; nothing where no label is known."""
    fit, seen = fit & (labels != ""), seen & (labels != "")
    if len(set(labels[fit])) < 2 or not seen.any():
        return np.empty((0, 3), dtype=np.int64)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=200, tol=1e-3))
    given = probe.fit(features[fit], labels[fit]).predict(features[seen])
    return counts(given, labels[seen], words.sentence[seen], task)


def counts(given: np.ndarray, true: np.ndarray, sentence: np.ndarray, task: str) -> np.ndarray:
    """For each sentence how many labels are right, given and true, (sentences, 3); of names how many spans."""
    rows = []
    for number in np.unique(sentence):
        own = sentence == number
        if task == "names":
            one, two = (set(spans(tags[own])) for tags in (given, true))
            rows.append((len(one & two), len(one), len(two)))
        else:
            rows.append(((given[own] == true[own]).sum(), own.sum(), own.sum()))
    return np.array(rows, dtype=np.int64)


def spans(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """The names in a sentence: where each begins and ends, and its kind. A name that begins by I- counts as one by B-."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            yield start, place, kind
            kind = ""
        if tag != "O" and not kind:
            start, kind = place, tag[2:]


def score(found: np.ndarray) -> float:
    """100 times F1 of such counts; where each word has one label, that is the accuracy."""
    right, given, true = found.sum(0)
    return float(200 * right / (given + true)) if given + true else 0.0
