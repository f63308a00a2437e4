"""The folder that a run writes to: checked before the first step, and one message for whatever goes wrong while it is written."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from . import one_line

# What torch and safetensors say where a write failed. Their errors have no number.
_WRITE_FAILED = ("PytorchStreamWriter", "I/O error", "IoError", "No space left", "unexpected pos")


def check_output_dir(path: str | None, what: str) -> None:
    """Check that a folder is given and can be written to. Nothing is made.

    Args:
        path: The folder, which need not exist.
        what: What the folder is for.

    Raises:
        ConfigError: It is missing, it is a file, or nothing can be written there.
    """
    if not path:
        raise ConfigError(f"output_dir is missing: {what}")
    nearest = _nearest(path)
    if not nearest.is_dir():
        raise ConfigError(f"output_dir {path} can't be made: {nearest} is a file: give a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
    except OSError as error:
        raise ConfigError(f"output_dir {path}: nothing can be written to {nearest}: {error.strerror}") from error


def make_output_dir(path: str) -> None:
    """Make a folder.

    Raises:
        ConfigError: It can't be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {path} can't be made: {error.strerror}") from error


def check_space(path: str, parameters: Iterable[Tensor], copies: int) -> None:
    """Check that what a run saves first fits on the disk.

    Args:
        path: The folder.
        parameters: What is trained, and therefore saved.
        copies: How many numbers are saved for each number that is trained.

    Raises:
        ConfigError: There is less space.
    """
    needed = copies * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    free = shutil.disk_usage(_nearest(path)).free
    if free < needed:
        sizes = f"what is saved first takes {_megabytes(needed)}, and {_megabytes(free)} are free on its disk"
        raise ConfigError(f"output_dir {path}: {sizes}")


@contextmanager
def writing(path: Any) -> Iterator[None]:
    """Raise ConfigError for an error of writing in the `with` block, with a message that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO):
            raise
        raise ConfigError(f"can't write to {path}: {error.strerror}") from error
    except Exception as error:  # torch raises RuntimeError, and safetensors an error of its own
        if not any(sign in str(error) for sign in _WRITE_FAILED):
            raise
        raise ConfigError(f"can't write to {path}: {one_line(error)}") from error


def _nearest(path: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count} bytes"
