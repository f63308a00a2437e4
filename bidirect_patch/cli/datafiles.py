"""Files of texts: their formats, and one message for whatever goes wrong while they are read."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from . import one_line

# The ending of a file -> the name of the builder in the library `datasets` that reads it.
READERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv"}


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
            inside = sorted(entry for entry in Path(path).iterdir() if entry.is_file() and _reader_of(str(entry)))
            if not inside:
                raise ConfigError(f"the folder {path} holds no file that ends in {_endings()}")
            files += map(str, inside)
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise ConfigError(f"no such file or folder: {path}")
    if not any(map(os.path.getsize, files)):
        raise ConfigError(
            f"there is no text in {' and '.join(files)}: {'all are' if len(files) > 1 else 'the file is'} empty"
        )
    return [file for file in files if os.path.getsize(file)]


def reader_of_all(files: Sequence[str]) -> str:
    """Return the name of the builder that reads some files.

    Raises:
        ConfigError: They are of an unknown kind, or of several.
    """
    readers = {_reader_of(file) for file in files}
    if len(readers) != 1 or None in readers:
        raise ConfigError(f"files must end in {_endings()}, and all be of one kind; got {' and '.join(files)}")
    return str(readers.pop())


def _reader_of(file: str) -> str | None:
    return READERS.get(os.path.splitext(file)[1][1:].lower())


def _endings() -> str:
    return ", ".join(f".{ending}" for ending in READERS)
