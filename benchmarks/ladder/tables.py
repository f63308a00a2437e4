"""The tables, from the results that are there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.ladder.retrieval import reciprocal
from benchmarks.ladder.rows import CAUSAL_ROW, UNTRAINED, Row
from benchmarks.ladder.tagging import TASKS as TAGGING
from benchmarks.ladder.texts import TASKS, group_of
from bidirect_patch.cli.sweep.scores import DRAWS, Bootstrap, interval

# A line of a table: its notes, and for each column its value and its value in each draw, (1 + draws,).
Line = tuple[Sequence[str], dict[str, np.ndarray]]
HOW = "how it is read"


class Table:
    """Lines with intervals, and what each is ahead of others by, on the same draws.

    Args:
        columns: What is measured.
        notes: The columns before these, which have no interval.
    """

    def __init__(self, columns: Iterable[str], notes: Sequence[str] = (HOW,)) -> None:
        self.columns, self.notes = list(columns), notes
        self.lines: dict[str, Line] = {}
        self.against: list[tuple[str, str]] = []

    def add(
        self, name: str, notes: Sequence[str], values: Sequence[dict[str, np.ndarray]], against: Iterable[str] = ()
    ) -> None:
        """Add a line, the mean of several seeds; `against` names the lines that it is set beside."""
        mean = {column: np.mean([value[column] for value in values], axis=0) for column in values[0]}
        self.lines[name] = notes, mean
        self.against += [(name, other) for other in against]

    def __str__(self) -> str:
        rows = [["", *self.notes, *self.columns]]
        for name, (notes, values) in self.lines.items():
            rows.append([name, *notes, *(f"{interval(values[c]):}" if c in values else "" for c in self.columns)])
        ahead = [["ahead by", *self.columns]]
        for name, other in self.against:
            if other in self.lines and other != name:
                one, two = self.lines[name][1], self.lines[other][1]
                cells = (f"{interval(one[c] - two[c]):+}" if c in one and c in two else "" for c in self.columns)
                ahead.append([f"{name}, of {other}", *cells])
        return _markdown(rows) + ("\n\n" + _markdown(ahead) if len(ahead) > 1 else "")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rest)]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def _others(row: Row) -> list[str]:
    """The causal row with the same training, and the untrained row with the same attention."""
    return [str(row.causal), str(row._replace(recipe=UNTRAINED))]


def sentences(results: Mapping[Row, Any], scores: Mapping[str, np.ndarray], teacher: Any) -> str:
    """The table of sentences.

    Args:
        results: What `sentences.measured` gave, by row.
        scores: The scores of each set.
        teacher: The line of the teacher; None if there is none.
    """
    groups, values = _correlations(scores)
    table = Table(groups, (HOW, "dev"))

    def notes(lines: Sequence[Any]) -> tuple[str, str]:
        return _hows(lines), f"{np.mean([line['dev'] for line in lines]):.1f}"

    untrained = {"causal": "causal", "sink": "bidirectional, 1 sink token", "opened": "bidirectional"}
    untrained["sinkless"] = f"{untrained['sink']}, hidden from the last layer"
    for name, group in _by_name(results).items():
        row = next(iter(group))
        for key in results[row]:
            lines = [results[each][key] for each in group]
            title = f"{UNTRAINED}, {key}" if key else name
            same = f"{UNTRAINED}, {untrained.get(row.attention, '')}"
            causal = str(row.causal)
            hidden = f"{UNTRAINED}, causal, first token hidden from the last layer"
            others = [causal, same] if row.steps else [causal, hidden] if title != causal else []
            table.add(title, notes(lines), [values(line) for line in lines], others)
    if teacher is not None:
        table.add("the teacher itself", notes([teacher[""]]), [values(teacher[""])])
    return str(table)


def curve(results: Mapping[Row, Any], scores: Mapping[str, np.ndarray]) -> str:
    """The table of curves: a line for each number of tokens, beside the line before training.

    Args:
        results: What `curve.measured` gave, by row.
        scores: The scores of each set.
    """
    groups, values = _correlations(scores)
    table = Table(groups, ("tokens", "steps", "loss", HOW, "dev"))
    for row, lines in results.items():
        for tokens, line in lines.items():
            loss = "" if line["loss"] is None else f"{line['loss']:.3f}"
            notes = (f"{int(tokens):,}", str(line["steps"]), loss, line["how"], f"{line['dev']:.1f}")
            table.add(f"{row}, {int(tokens):,}", notes, [values(line)], [f"{row}, 0"])
    return str(table)


def _correlations(scores: Mapping[str, np.ndarray]) -> tuple[list[str], Callable[[Any], dict[str, np.ndarray]]]:
    """The columns of some sets of pairs, and what gives a line's value in each, with its draws."""
    draws = {name: Bootstrap(values) for name, values in scores.items()}
    groups = list(dict.fromkeys(group_of(name) for name in scores))

    def values(line: Any) -> dict[str, np.ndarray]:
        drawn = {name: draws[name].drawn(np.array(line["cosines"][name])) for name in line["cosines"]}
        return {g: np.mean([v for name, v in drawn.items() if group_of(name) == g], axis=0) for g in groups}

    return groups, values


def words(results: Mapping[Row, Any]) -> str:
    """The table of words."""
    return _counted(results, TASKS, _f1)


def tagging(results: Mapping[Row, Any]) -> str:
    """The table of fine-tuned words."""
    return _counted(results, TAGGING, _f1)


def retrieval(results: Mapping[Row, Any]) -> str:
    """The table of questions."""
    columns = [f"{name}: {measure}" for name in ("one vector", "MaxSim") for measure in ("accuracy@1", "MRR@10")]

    def values(line: Any) -> dict[str, np.ndarray]:
        found = {}
        for name, each in line.items():
            ranks = np.array(each["ranks"])
            found[f"{name}: accuracy@1"] = _mean(ranks == 1)
            found[f"{name}: MRR@10"] = _mean(reciprocal(ranks))
        return found

    table = Table(columns)
    for name, group in _by_name(results).items():
        row = next(iter(group))
        lines = [results[each] for each in group]
        hows = "; ".join(f"{key}: {each['how']}" for key, each in lines[0].items())
        table.add(name, [hows], [values(line) for line in lines], _others(row))
    return str(table)


def _counted(results: Mapping[Row, Any], columns: Sequence[str], value: Callable[[np.ndarray], np.ndarray]) -> str:
    table = Table(columns)
    for name, group in _by_name(results).items():
        row = next(iter(group))
        for key in results[row]:
            lines = [results[each][key] for each in group]
            hows = "; ".join(f"{task}: {each['how']}" for task, each in lines[0].items())
            title = f"{row.recipe}, {key}" if key else name
            others = [name, *_others(row)] if key else _others(row)
            if row.recipe == UNTRAINED and row.attention != CAUSAL_ROW:
                others.append(f"{UNTRAINED}, causal + next state")
            counts = [{task: value(np.array(each["counts"])) for task, each in line.items()} for line in lines]
            table.add(title, [hows], counts, dict.fromkeys(others))
    return str(table)


def _f1(counts: np.ndarray) -> np.ndarray:
    right, given, true = counts[_draws(len(counts))].sum(1).T
    return 200 * right / (given + true)


def _mean(values: np.ndarray) -> np.ndarray:
    return 100 * values[_draws(len(values))].mean(1)


def _draws(count: int) -> np.ndarray:
    """All things, and draws of as many of them, (1 + draws, things)."""
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    return np.concatenate([np.arange(count)[None], drawn])


def _by_name(results: Mapping[Row, Any]) -> dict[str, list[Row]]:
    """The rows of each name, which differ in their seed."""
    found: dict[str, list[Row]] = {}
    for row in results:
        found.setdefault(str(row), []).append(row)
    return found


def _hows(lines: Sequence[Any]) -> str:
    return "; ".join(dict.fromkeys(line["how"] for line in lines))
