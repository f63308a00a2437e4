"""What a dry run has in place of a GPU's kernels, and which backends a machine has."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def backend_there(backend: str, dry: bool) -> Iterator[None]:
    """In a dry run, the tests' FlashAttention double while the block lasts, and nothing is compiled.

    Args:
        backend: A name of `attn_implementation`.
        dry: Whether this is a dry run. Otherwise nothing is changed.
    """
    with contextlib.ExitStack() as stack:
        if dry and backend.startswith("flash_attention"):
            import pytest

            from tests.helpers.flash_double import FlashDouble

            FlashDouble(stack.enter_context(pytest.MonkeyPatch.context())).install(int(backend[-1]))
        if dry:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def flash_backends(dry: bool) -> list[str]:
    """The FlashAttention backends that can run here, newest last. A dry run has doubles of 2 and 4."""
    if dry:
        return ["flash_attention_2", "flash_attention_4"]
    from transformers.utils import import_utils

    found = []
    for version in (2, 3, 4):
        is_there = getattr(import_utils, f"is_flash_attn_{version}_available", None)
        if is_there is not None and is_there():
            found.append(f"flash_attention_{version}")
    return found
