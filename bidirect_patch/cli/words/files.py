"""Files of words and their labels: CoNLL-U, IOB2, CoNLL's columns and JSON lines, each as columns by name."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError

TOKENS = "tokens"  # the column of the words
OTHER_TOKENS = "words"  # its other name in .jsonl
# The column of a .conllu file that has a name of LLM2Vec's too.
CONLLU = (None, TOKENS, "lemma", "upos", "xpos", "feats", None, "deprel", None, None)
CONLLU_POS, POS = "upos", "pos_tags"
IOB2 = (None, TOKENS, "ner_tags")  # of universal NER; two more columns are not read
CONLL = (TOKENS, "pos_tags", "chunk_tags", "ner_tags")  # CoNLL-2003; CoNLL-2000 has the first three
NO_LABEL = "_"  # of a word that has none, in CoNLL-U
DOCUMENT = "-DOCSTART-"
READ = (".conllu", ".iob2", ".conll", ".txt", ".jsonl", ".json")

Rows = list[list[str]]  # of a sentence, a row a word
Columns = dict[str, list[str]]  # of a sentence, by name


def find_word_files(paths: Sequence[str]) -> list[Path]:
    """Return the files that are named. A folder stands for the files of words in it, by their names.

    Raises:
        ConfigError: There is no such file or folder, or one that is of no known kind.
    """
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(entry for entry in Path(path).iterdir() if entry.is_file() and entry.suffix in READ)
            if not inside:
                raise ConfigError(f"the folder {path} holds no file that ends in {', '.join(READ)}")
            files += inside
        elif not os.path.isfile(path):
            raise ConfigError(f"no such file or folder: {path}")
        elif Path(path).suffix not in READ:
            raise ConfigError(f"a file of words must end in {', '.join(READ)}; got {path}")
        else:
            files.append(Path(path))
    return files


def read_file(path: Path, names: Sequence[str] | None) -> list[Columns]:
    """Read the sentences of a file.

    Args:
        path: The file. Its ending says what kind it is.
        names: The names of the columns of a .conll or .txt file.

    Raises:
        ConfigError: The file can't be read, holds no sentence, or a line is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error
    read = {".conllu": _conllu, ".iob2": _iob2, ".jsonl": _json_lines, ".json": _json_lines}.get(path.suffix)
    sentences = list(_conll(path, text, names) if read is None else read(path, text))
    if not sentences:
        raise ConfigError(f"there is no sentence in {path}")
    return sentences


def _conllu(path: Path, text: str) -> Iterator[Columns]:
    for number, rows in _blocks(text, "\t", comments=True):
        words: Rows = []
        for offset, row in enumerate(rows):
            if len(row) != len(CONLLU):
                _refuse(path, number + offset, f"CoNLL-U has {len(CONLLU)} columns between tabs; got {len(row)}")
            if not re.fullmatch(r"\d+([-.]\d+)?", row[0]):
                _refuse(path, number + offset, f"the first column is the number of a word; got {row[0]!r}")
            if row[0].isdigit():  # neither a range of words that are written as one, nor an empty node
                words.append(row)
        if words:
            columns = _columns(words, CONLLU)
            yield columns | {POS: columns[CONLLU_POS]}


def _iob2(path: Path, text: str) -> Iterator[Columns]:
    for number, rows in _blocks(text, None, comments=True):
        for offset, row in enumerate(rows):
            if len(row) < 2 or (len(row) > 2 and not row[0].isdigit()):
                _refuse(path, number + offset, f"a word and its label are needed, or a number before both; got {row}")
        names = IOB2 if len(rows[0]) > 2 else IOB2[1:]
        short = next((offset for offset, row in enumerate(rows) if len(row) < len(names)), None)
        if short is not None:
            _refuse(path, number + short, f"{len(names)} columns are needed; got {rows[short]}")
        columns = _columns(rows, names)
        for offset, label in enumerate(columns[IOB2[2]]):
            if not re.fullmatch(r"O|[BI]-.+", label):
                _refuse(path, number + offset, f"a label of IOB2 is O, B-... or I-...; got {label!r}")
        yield columns


def _conll(path: Path, text: str, names: Sequence[str] | None) -> Iterator[Columns]:
    count = 0
    for number, rows in _blocks(text, None, comments=False):
        if rows[0][0] == DOCUMENT:
            continue
        count = count or len(rows[0])
        known = names or CONLL[:count]
        if len(known) != count or count < 2:
            given = (
                f"columns names {len(known)}"
                if names
                else "2 to 4 are known by themselves: give columns, a name for each"
            )
            _refuse(path, number, f"there are {count} columns, and {given}")
        for offset, row in enumerate(rows):
            if len(row) != count:
                _refuse(path, number + offset, f"{count} columns are needed, as in the first line; got {len(row)}")
        yield _columns(rows, known if names or count > 2 else (TOKENS, ""))  # one kind of label, whatever its name


def _json_lines(path: Path, text: str) -> Iterator[Columns]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse(path, number, f"this is not JSON: {error}")
        if not isinstance(row, dict):
            _refuse(path, number, f"an object with tokens and labels is needed; got {type(row).__name__}")
        columns = {TOKENS if name == OTHER_TOKENS and TOKENS not in row else name: value for name, value in row.items()}
        words = columns.get(TOKENS)
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            _refuse(path, number, f"{TOKENS} must be a list of words; got {words!r:.80}")
        if words:
            yield {name: _labels(value) for name, value in columns.items() if _is_labels(value, len(words))}


def _is_labels(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(isinstance(label, (str, int)) and not isinstance(label, bool) for label in value)


def _labels(value: list[Any]) -> list[str]:
    return [str(label) for label in value]


def _blocks(text: str, separator: str | None, *, comments: bool) -> Iterator[tuple[int, Rows]]:
    """The lines between empty lines, each split into its columns, and the number of the first."""
    rows: Rows = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if comments and line.startswith("#") and not rows:
            continue
        if line.strip():
            start = start if rows else number
            rows.append(line.rstrip("\r\n").split(separator))
        elif rows:
            yield start, rows
            rows = []


def _columns(rows: Rows, names: Sequence[str | None]) -> Columns:
    return {name: [row[place] for row in rows] for place, name in enumerate(names) if name not in (None, NO_LABEL)}


def _refuse(path: Path, line: int, why: str) -> None:
    raise ConfigError(f"{path}, line {line}: {why}")
