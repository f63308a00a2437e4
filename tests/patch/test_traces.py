"""Graphs that `torch.jit.trace` records of a bidirectional model."""

import pytest
import torch
import transformers

from bidirect_patch import enable_bidirectional
from bidirect_patch.errors import ModeConflictError

from ..helpers.one_text import IDS, ONES, PADDED
from ..helpers.threads_and_forks import InBlock
from ..helpers.tiny_models import llama, tiny_config


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_a_trace_is_right_for_other_masks_and_lengths(backend, window):
    config = tiny_config("mistral", sliding_window=window)
    model = transformers.MistralModel._from_config(config, attn_implementation=backend).eval().requires_grad_(False)
    enable_bidirectional(model)

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask, return_dict=False)[0]

    traced = torch.jit.trace(run, (IDS, ONES), check_trace=False)
    ids = torch.arange(3, 33).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    for given in ((IDS, PADDED), (IDS, PADDED.flip(1)), (ids, mask)):
        real = given[1].bool()
        torch.testing.assert_close(traced(*given)[real], run(*given)[real], atol=1e-5, rtol=1e-5)


def test_no_trace_is_made_in_another_threads_causal_block():
    model = enable_bidirectional(llama()).requires_grad_(False)

    def trace():
        return torch.jit.trace(lambda ids: model(input_ids=ids, return_dict=False)[0], (IDS,), check_trace=False)

    with InBlock(model, False), pytest.raises(ModeConflictError, match="causal block"):
        trace()
