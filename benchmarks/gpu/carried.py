"""What the ladder needs on a machine without a network: weights and tokenized texts, as files of at most 60 MB.

    python -m benchmarks.gpu --prepare PARTS --data FOLDER --model FOLDER [--gguf_file NAME]

FOLDER holds sts/*.csv (sentence1, sentence2, score) and wikipedia.txt (a paragraph a line). Token ids are uint16.
"""

import contextlib
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ladder.model import save_plain
from benchmarks.ladder.texts import load_pairs, load_paragraphs, split_sentences

MOST_BYTES = 60_000_000
SENTENCE_TOKENS = 64  # no sentence to train on is read further
LONGEST = 512  # nor one that is evaluated


class Texts(Sequence[np.ndarray]):
    """Token ids of many texts, one behind the other.

    Args:
        ids: (tokens,), uint16.
        ends: (texts,), int64: where each text ends.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray) -> None:
        self.ids, self.ends = ids, ends

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Texts":
        """The texts of these lists of ids.

        Raises:
            ValueError: An id is too large for uint16.
        """
        ids = np.array([i for row in rows for i in row], dtype=np.int64)
        if ids.size and ids.max() >= 2**16:
            raise ValueError(f"token id {ids.max()} is too large for uint16: take a model with a smaller vocabulary")
        return cls(ids.astype(np.uint16), np.cumsum([len(row) for row in rows], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        """The ids of text `i`, (tokens,), int64."""
        begin = self.ends[i - 1] if i else 0
        return self.ids[begin : self.ends[i]].astype(np.int64)


def prepare(
    data: Path, model: Path | str, gguf_file: str | None, parts: Path, most_bytes: int = MOST_BYTES
) -> list[Path]:
    """Write the parts.

    Args:
        data: The folder of texts.
        model: A folder or hub name of a causal language model; its vocabulary is smaller than 65,536.
        gguf_file: The file in it, if the weights are a GGUF.
        parts: Where the parts are written. The parts of an earlier run there are replaced.
        most_bytes: Of one part.

    Returns:
        The files, in order.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_plain(model, gguf_file, folder / "model", torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        paragraphs = load_paragraphs(data)
        _save(folder / "paragraphs.npz", tokenizer, paragraphs, None)
        sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        _save(folder / "sentences.npz", tokenizer, sentences, SENTENCE_TOKENS)
        for file in sorted((data / "sts").glob("*.csv")):
            pairs = load_pairs(data, file.stem)
            both, scores = pairs.first + pairs.second, pairs.scores.astype(np.float32)
            _save(folder / f"sts-{file.stem}.npz", tokenizer, both, LONGEST, scores=scores)
        return _pack(folder, parts, most_bytes)


def _save(path: Path, tokenizer: Any, texts: list[str], limit: int | None, **more: np.ndarray) -> None:
    cut = {"truncation": True, "max_length": limit} if limit else {}
    made = Texts.of(tokenizer(texts, **cut)["input_ids"])
    np.savez(path, ids=made.ids, ends=made.ends, **more)


def _pack(folder: Path, parts: Path, most_bytes: int) -> list[Path]:
    """One compressed archive, cut into files."""
    parts.mkdir(parents=True, exist_ok=True)
    for old in parts.glob("part-*"):
        old.unlink()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz", preset=1) as tar:  # higher presets take minutes and save little
        tar.add(folder, arcname=".")
    whole = archive.getbuffer()
    written = []
    for i, begin in enumerate(range(0, len(whole), most_bytes)):
        written.append(parts / f"part-{i:03}")
        written[-1].write_bytes(whole[begin : begin + most_bytes])
    return written


@contextlib.contextmanager
def unpacked(parts: Path) -> Iterator[Path]:
    """A temporary folder with what the parts hold.

    Raises:
        FileNotFoundError: There are no parts.
    """
    files = sorted(parts.glob("part-*"))
    if not files:
        raise FileNotFoundError(f"no part-000 in {parts}: make it by --prepare")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tempfile.TemporaryFile() as whole:
            for file in files:
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, whole)
            whole.seek(0)
            with tarfile.open(fileobj=whole, mode="r:xz") as tar:
                tar.extractall(folder, filter="data")
        yield folder


def load_texts(path: Path) -> Texts:
    """The texts of one file."""
    with np.load(path) as arrays:
        return Texts(arrays["ids"], arrays["ends"])


def load_scores(path: Path) -> np.ndarray:
    """The scores of a file of pairs, (pairs,), float32: texts i and pairs + i are pair i."""
    with np.load(path) as arrays:
        return arrays["scores"]
