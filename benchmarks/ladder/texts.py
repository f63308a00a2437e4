"""The files: scored pairs, tagged words, questions with their paragraphs, and texts to train on."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bidirect_patch.cli.pairs import load_pairs
from bidirect_patch.cli.sweep.texts import Pairs

DEV_PAIRS = 400  # at most
SENTENCES = 700  # tagged ones, to fit and to test
QUESTIONS = 1200
SHORTEST, LONGEST = 5, 60  # words of a sentence to train on
_YEAR = re.compile("sts20[0-9]{2}")


def some(count: int, most: int) -> list[int]:
    """The places of `most` of so many things, the same whenever it is asked."""
    chosen: list[int] = np.sort(np.random.default_rng(0).permutation(count)[:most]).tolist()
    return chosen


# --- sentences ---


def scored_pairs(folder: Path, most: int) -> tuple[Pairs, dict[str, Pairs]]:
    """The pairs to choose on, of the file whose name ends in `dev`, and those to report, by the name of their file.

    Args:
        folder: The files.
        most: How many pairs of a file are reported; of each of SemEval's years a quarter of that.
    """
    found = {}
    for file in sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")]):
        count = DEV_PAIRS if _is_dev(file.stem) else most // 4 if _YEAR.fullmatch(file.stem) else most
        data = load_pairs(str(file), str(file), None)
        found[file.stem] = Pairs.of(data.select(some(len(data), count)))
    dev = [name for name in found if _is_dev(name)]
    if len(dev) != 1:
        raise SystemExit(f"{folder} needs one file of pairs whose name ends in dev, to choose on; it has {len(dev)}")
    return found.pop(dev[0]), found


def group_of(name: str) -> str:
    """The column of a set. Those of SemEval's years are one column, the mean over them."""
    return "STS12-16" if _YEAR.fullmatch(name) else name


def _is_dev(name: str) -> bool:
    return name.endswith("dev")


# --- words ---


class Sentence(NamedTuple):
    """A sentence whose words have labels.

    Attributes:
        text: The sentence.
        spans: Where each word begins and ends in it.
        labels: For each task the label of each word. `names` is missing where the names are not known.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    labels: dict[str, list[str]]

    @property
    def words(self) -> list[str]:
        """Its words."""
        return [self.text[start:end] for start, end in self.spans]


TASKS = ("part of speech", "relation", "direction of the head", "names")


def tagged_sentences(folder: Path, part: str) -> list[Sentence]:
    """Sentences of FOLDER/*PART*.conllu, with the names of FOLDER/*PART*.iob2 where their words are the same."""
    names = {words: tags for file in sorted(folder.glob(f"*{part}*.iob2")) for words, tags in _names(file)}
    found = [sentence for file in sorted(folder.glob(f"*{part}*.conllu")) for sentence in _sentences(file, names)]
    return [found[i] for i in some(len(found), SENTENCES)]


def _sentences(file: Path, names: dict[tuple[str, ...], list[str]]) -> Iterator[Sentence]:
    for lines in _blocks(file):
        rows = [line.split("\t") for line in lines if line[0].isdigit()]
        rows = [row for row in rows if row[0].isdigit()]  # without what stands for several words, or for none
        words = [row[1] for row in rows]
        text = next((line.partition("=")[2].strip() for line in lines if line.startswith("# text =")), "")
        text, spans = _placed(text, words)
        heads = [(int(row[0]), int(row[6])) for row in rows]
        labels = {
            "part of speech": [row[3] for row in rows],
            "relation": [row[7].partition(":")[0] for row in rows],
            "direction of the head": ["root" if not head else "left" if head < own else "right" for own, head in heads],
        }
        if tuple(words) in names:
            labels["names"] = names[tuple(words)]
        yield Sentence(text, spans, labels)


def _names(file: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for lines in _blocks(file):
        rows = [line.split("\t") for line in lines if line[0].isdigit()]
        yield tuple(row[1] for row in rows), [row[2] for row in rows]


def _blocks(file: Path) -> Iterator[list[str]]:
    for block in file.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if line.strip()]
        if any(line[0].isdigit() for line in lines):
            yield lines


def _placed(text: str, words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text with the place of each word; where a word is not in it as it stands, the words with spaces between them."""
    spans, end = [], 0
    for word in words:
        start = text.find(word, end)
        if start < 0:
            return _placed(" ".join(words), words)
        end = start + len(word)
        spans.append((start, end))
    return text, spans


# --- retrieval ---


class Questions(NamedTuple):
    """Questions, each of which one paragraph answers.

    Attributes:
        paragraphs: All paragraphs.
        questions: All questions.
        answers: Which paragraph answers each question, (questions,).
        to_choose: Whether a question is to choose on, as those of every other article are, or to report. (questions,), bool.
    """

    paragraphs: list[str]
    questions: list[str]
    answers: np.ndarray
    to_choose: np.ndarray


def questions(folder: Path) -> Questions:
    """Questions of FOLDER/*.json, which has SQuAD's form."""
    paragraphs, asked = [], []
    for file in sorted(folder.glob("*.json")):
        for number, article in enumerate(json.loads(file.read_text(encoding="utf-8"))["data"]):
            for paragraph in article["paragraphs"]:
                asked += [(qa["question"], len(paragraphs), number % 2 == 0) for qa in paragraph["qas"]]
                paragraphs.append(paragraph["context"])
    asked = [asked[i] for i in some(len(asked), QUESTIONS)]
    texts, answers, to_choose = zip(*asked)
    return Questions(paragraphs, list(texts), np.array(answers), np.array(to_choose))


# --- training ---


def write_training_texts(data: Path, out: Path) -> None:
    """Write `paragraphs.txt`, `sentences.txt` and `neighbours.jsonl` of the .txt files in a folder, a paragraph a line.

    Raises:
        SystemExit: `out` holds such files of other texts.
    """
    lines = [line.strip() for file in sorted(data.glob("*.txt")) for line in file.read_text(encoding="utf-8").splitlines()]
    paragraphs = [line for line in lines if line]
    split = [split_sentences(paragraph) for paragraph in paragraphs]
    files = {
        "paragraphs.txt": paragraphs,
        "sentences.txt": [sentence for inside in split for sentence in inside],
        "neighbours.jsonl": [json.dumps({"query": a, "positive": b}) for inside in split for a, b in pairwise(inside)],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text, file = "".join(f"{row}\n" for row in rows), out / name
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{file} is of other texts than --data gives now: name another --out")
        file.write_text(text, encoding="utf-8")


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, of SHORTEST to LONGEST words."""
    found = re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)
    return [s for s in found if SHORTEST <= len(s.split()) <= LONGEST]
