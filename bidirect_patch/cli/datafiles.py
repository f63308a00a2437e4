"""Files of texts: their formats, and one message for whatever goes wrong while they are read."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from . import one_line

# The ending of a file -> the name of the builder in the library `datasets` that reads it.
READERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv"}

Kind = Literal["text", "list", "other"]  # of a column that holds text


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise ConfigError for any error in the `with` block, with a message that names what is read."""
    try:
        yield
    except Exception as error:  # `datasets` and the hub raise errors of many classes
        raise ConfigError(f"can't read {what}: {one_line(error.__cause__ or error)}") from error


def find_files(paths: Sequence[str]) -> list[str]:
    """Return the files of texts that are named. A folder stands for the files of texts in it, by their names.

    Args:
        paths: Files and folders.

    Raises:
        ConfigError: There is no such file or folder, a folder holds no file of texts, or all files are empty.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            files += files_in(path)
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise ConfigError(f"no such file or folder: {path}")
    if not any(map(os.path.getsize, files)):
        raise ConfigError(
            f"there is no text in {' and '.join(files)}: {'all are' if len(files) > 1 else 'the file is'} empty"
        )
    return [file for file in files if os.path.getsize(file)]


def files_in(folder: str) -> list[str]:
    """Return the files of texts in a folder, by their names.

    Raises:
        ConfigError: It holds none.
    """
    inside = sorted(entry for entry in Path(folder).iterdir() if entry.is_file() and reader_of(str(entry)))
    if not inside:
        raise ConfigError(f"the folder {folder} holds no file that ends in {_endings()}")
    return [str(entry) for entry in inside]


def reader_of_all(files: Sequence[str]) -> str:
    """Return the name of the builder that reads some files.

    Raises:
        ConfigError: They are of an unknown kind, or of several.
    """
    readers = {reader_of(file) for file in files}
    if len(readers) != 1 or None in readers:
        raise ConfigError(f"files must end in {_endings()}, and all be of one kind; got {' and '.join(files)}")
    return str(readers.pop())


def reader_of(file: str) -> str | None:
    """Return the name of the builder that reads a file, or None if there is none for its ending."""
    return READERS.get(os.path.splitext(file)[1][1:].lower())


def columns_of_text(features: Any) -> dict[str, Kind]:
    """Return the columns that hold text, in their order, and how: a text, a list of texts, or in another way.

    Args:
        features: The columns of a data set and their types, as `datasets` has them.
    """
    types = {field.name: str(field.type) for field in features.arrow_schema}
    return {name: _kind(kind) for name, kind in types.items() if "string" in kind or "json" in kind}


def _kind(arrow_type: str) -> Kind:
    if re.fullmatch("(large_)?string", arrow_type):
        return "text"
    return "list" if re.fullmatch(r"(large_)?list<\w+: (large_)?string>", arrow_type) else "other"


def _endings() -> str:
    return ", ".join(f".{ending}" for ending in READERS)
