"""Progress bars are for people: one line of a terminal, and nothing in a file or a pipe."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("datasets", reason="the training commands need the extra [train]")

import datasets
from transformers.utils import logging

from bidirect_patch.cli.progress import hide_bars_in_files


@pytest.fixture(autouse=True)
def bars():
    """They are on before and after. A command that ran in this process may have turned them off."""
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
    yield
    datasets.enable_progress_bars()
    logging.enable_progress_bar()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_shown_in_a_terminal_alone(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    training = SimpleNamespace(disable_tqdm=False)
    hide_bars_in_files(training)
    assert training.disable_tqdm is not is_terminal
    assert datasets.are_progress_bars_disabled() is not is_terminal
    assert logging.is_progress_bar_enabled() is is_terminal
