"""`transformers.utils.fx.symbolic_trace`, on the releases that have it and on which it traces a stock Llama."""

import importlib.util

import pytest
import torch

from bidirect_patch import enable_bidirectional

from ..helpers.seeing import IDS
from ..helpers.tiny_models import tiny_model


@pytest.mark.skipif(importlib.util.find_spec("transformers.utils.fx") is None, reason="this transformers has no torch.fx tracer")
def test_what_it_traces_is_bidirectional():
    from transformers.utils.fx import symbolic_trace

    model = tiny_model(backend="eager")
    try:
        symbolic_trace(model, input_names=["input_ids"])
    except Exception as error:  # of its own
        pytest.skip(f"it doesn't trace the stock model: {error}")
    enable_bidirectional(model)
    traced = symbolic_trace(model, input_names=["input_ids"])
    other = IDS[:1].clone()
    other[:, -1] = 60
    with torch.no_grad():
        assert torch.equal(traced(IDS[:1])["logits"], model(IDS[:1]).logits)
        moved = (traced(IDS[:1])["logits"] - traced(other)["logits"]).abs().amax(-1)[0] > 1e-6
    assert moved.all()
