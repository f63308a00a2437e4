"""Marking some of many cases as slow."""

import os

import pytest

THOROUGH = bool(os.environ.get("BIDIRECT_PATCH_THOROUGH"))  # whether cases are run that are like others that are run


def some_slow(names, is_slow):
    """`names` to parametrize with, those marked slow of which that is so."""
    return [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in names]
