"""The texts: pairs of sentences with scores to measure on, and an encyclopedia to train on."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEV = "stsb-dev"  # settings are chosen on this set alone
YEARS = ("sts2012", "sts2013", "sts2014", "sts2015", "sts2016")
TEST = ("stsb-test", "sick-r-test", *YEARS)
ON_THE_HUB = {  # set: data set and split
    DEV: ("sentence-transformers/stsb", "validation"),
    "stsb-test": ("sentence-transformers/stsb", "test"),
    "sick-r-test": ("mteb/sickr-sts", "test"),
    **{year: (f"mteb/sts{year[-2:]}-sts", "test") for year in YEARS},
}
WIKIPEDIA = ("Salesforce/wikitext", "wikitext-2-raw-v1")
SHORTEST, LONGEST = 5, 60  # words of a sentence to train on


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences, and how alike people found them.

    Args:
        first, second: The sentences.
        scores: (pairs,), float64.
    """

    first: list[str]
    second: list[str]
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def shortened(self, count: int) -> "Pairs":
        """The same `count` pairs on every call, drawn from all of them."""
        chosen = np.random.default_rng(0).permutation(len(self))[:count]
        return Pairs([self.first[i] for i in chosen], [self.second[i] for i in chosen], self.scores[chosen])


def load_pairs(data: Path | None, name: str) -> Pairs:
    """One set, from DATA/sts/NAME.csv, or from the hub where no folder is given."""
    if data is not None:
        with open(data / "sts" / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        from datasets import load_dataset

        repository, split = ON_THE_HUB[name]
        rows = list(load_dataset(repository, split=split))
    scores = np.array([float(row["score"]) for row in rows])
    return Pairs([row["sentence1"] for row in rows], [row["sentence2"] for row in rows], scores)


def load_paragraphs(data: Path | None) -> list[str]:
    """The paragraphs of the encyclopedia, from DATA/wikipedia.txt, or WikiText-2's from the hub."""
    if data is not None:
        lines = (data / "wikipedia.txt").read_text(encoding="utf-8").splitlines()
    else:
        from datasets import load_dataset

        lines = load_dataset(*WIKIPEDIA, split="train")["text"]
    return [line.strip() for line in lines if line.strip()]


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, of SHORTEST to LONGEST words."""
    found = re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)
    return [s for s in found if SHORTEST <= len(s.split()) <= LONGEST]
