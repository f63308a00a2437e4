"""Forwards from before the patch: one that somebody kept is bidirectional too, and one that is put on again is seen."""

import pytest
import torch
from transformers import LlamaModel

from bidirect_patch import enable_bidirectional, is_bidirectional

from ..helpers.one_text import BOTH, ONES, PADDED, moves
from ..helpers.tiny_models import llama


@pytest.mark.parametrize(
    "backend, compiled",
    [("eager", False), ("sdpa", False), pytest.param("eager", True, marks=pytest.mark.slow), ("sdpa", True)],
)
def test_a_forward_taken_before_the_patch_is_bidirectional_too(backend, compiled):
    model = llama(backend=backend)
    forward = torch.compile(model.forward, backend="eager") if compiled else model.forward
    enable_bidirectional(model)
    assert moves(forward) == moves(forward, attention_mask=ONES) == BOTH
    assert moves(forward, at=6, attention_mask=PADDED)[:7] == BOTH[:7]


def test_a_forward_that_goes_around_the_patch_is_seen():
    model = enable_bidirectional(llama())
    model.forward = LlamaModel.forward.__get__(model)
    model.layers[0].self_attn.forward = type(model.layers[0].self_attn)._original.forward.__get__(
        model.layers[0].self_attn
    )
    assert not is_bidirectional(model)
