"""Fixtures of the tests of `bidirect-patch sweep`."""

import pytest

from ...helpers.simcse_runs import write_pairs
from ...helpers.tiny_models import save_llama
from ...helpers.words import make_tokenizer


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama whose tokenizer adds no token by itself, `dev.csv` and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = make_tokenizer(60, underscore=False)
    save_llama(folder / "model", tokenizer, num_hidden_layers=4, initializer_range=0.2)
    write_pairs(folder / "dev.csv", count=40)
    write_pairs(folder / "test.jsonl", count=30, seed=1)
    return folder
