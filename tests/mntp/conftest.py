"""Fixtures of the tests of MNTP."""

import pytest

from bidirect_patch.mntp import loss as linear_loss

from ..helpers.heads import VOCAB
from ..helpers.words import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=[VOCAB, 7], ids=["one-chunk", "chunks-of-7-rows"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * VOCAB * request.param)
