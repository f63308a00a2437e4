"""`transformers.utils.fx.symbolic_trace`, on the releases that have it and on which it traces a stock Llama."""

import importlib.util

import pytest

from ..helpers.processes import in_a_new_process

TRACE = """
import torch
from transformers.utils.fx import symbolic_trace

from bidirect_patch import enable_bidirectional
from tests.helpers.seeing import IDS
from tests.helpers.tiny_models import tiny_model

model = tiny_model(backend="eager")
try:
    symbolic_trace(model, input_names=["input_ids"])
except Exception as error:
    print("stock:", error)
else:
    enable_bidirectional(model)
    traced = symbolic_trace(model, input_names=["input_ids"])
    other = IDS[:1].clone()
    other[:, -1] = 60
    with torch.no_grad():
        assert torch.equal(traced(IDS[:1])["logits"], model(IDS[:1]).logits)
        moved = (traced(IDS[:1])["logits"] - traced(other)["logits"]).abs().amax(-1)[0] > 1e-6
    print(moved.tolist())
"""


@pytest.mark.skipif(importlib.util.find_spec("transformers.utils.fx") is None, reason="this transformers has no torch.fx tracer")
def test_what_it_traces_is_bidirectional():
    # In a process of its own: where the tracer fails, its own classes stay in the modules of transformers.
    seen = in_a_new_process("-c", TRACE)
    if seen.startswith("stock:"):
        pytest.skip(f"it doesn't trace the stock model: {seen[6:]}")
    moved = seen.strip()
    assert "True" in moved and "False" not in moved, moved
