"""Files of texts: their formats, and one message for whatever goes wrong while they are read."""

from collections.abc import Iterator
from contextlib import contextmanager

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
