"""Falcon with ALiBi on old releases, whose attention adds one bias a key for all queries."""

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError

from ..helpers.seeing import IDS
from ..helpers.versions import TRANSFORMERS

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)


def falcon(backend):
    config = transformers.FalconConfig(**SIZES, new_decoder_architecture=False)
    return transformers.FalconModel._from_config(config, attn_implementation=backend).eval()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_each_way_to_run_it_is_bidirectional_or_refused_with_the_reason(backend):
    model = falcon(backend)
    with torch.no_grad():
        if TRANSFORMERS >= Version("4.45"):
            assert is_bidirectional(enable_bidirectional(model))
            assert model(IDS, output_attentions=True).last_hidden_state.shape[:2] == IDS.shape
            return
        if backend == "sdpa":
            assert is_bidirectional(enable_bidirectional(model)) and model(IDS).last_hidden_state.shape[:2] == IDS.shape
        with pytest.raises(UnsupportedModelError, match="one ALiBi bias a key for all queries"):
            enable_bidirectional(model)(IDS, output_attentions=True)
