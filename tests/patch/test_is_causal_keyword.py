"""`is_causal` in a call is never swallowed: an error, or the model's own TypeError where it knows no such keyword."""

from functools import partial

import pytest
import torch
from packaging.version import Version
from transformers import OPTConfig, OPTForCausalLM

from bidirect_patch import bidirectional, enable_bidirectional
from bidirect_patch.errors import ArgumentError

from ..helpers.one_text import moved_by_last
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import TRANSFORMERS

IDS = torch.tensor([[5, 6, 7, 8, 9]])
moved = partial(moved_by_last, ids=IDS)


def opt():
    """Its models share one config, from which transformers takes the keyword on its way down."""
    if Version("5.2") > TRANSFORMERS:
        pytest.skip(f"transformers {TRANSFORMERS}: OPTForCausalLM takes the keyword and hands it to nobody")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval()


MODELS = {
    "model": lambda: tiny_model("llama", head=False),
    "with head": lambda: tiny_model("llama"),
    "windows": lambda: tiny_model("mistral", sliding_window=3),
    "opt": opt,
}


def knows_keyword(model):
    try:
        with torch.no_grad():
            model(input_ids=IDS, is_causal=True)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", MODELS)
def test_causal_attention_asked_for_by_keyword_is_refused(name):
    model = MODELS[name]()
    error = ArgumentError if knows_keyword(model) else TypeError
    enable_bidirectional(model)
    with pytest.raises(error, match="enabled=False" if error is ArgumentError else "is_causal"):
        model(input_ids=IDS, is_causal=True)
    assert moved(model).all()
    if error is ArgumentError:
        assert moved(model, is_causal=False).all() and moved(model, is_causal=None).all()


@pytest.mark.parametrize("name", MODELS)
def test_bidirectional_attention_asked_for_by_keyword_is_refused_in_a_causal_block(name):
    model = MODELS[name]()
    error = ArgumentError if knows_keyword(model) else TypeError
    enable_bidirectional(model)
    with bidirectional(model, enabled=False):
        with pytest.raises(error, match="is_causal"):
            model(input_ids=IDS, is_causal=False)
        assert not moved(model)[:-1].any()
        if error is ArgumentError:
            assert not moved(model, is_causal=True)[:-1].any()
    assert moved(model).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_config_that_says_so_is_no_keyword(name):
    model = MODELS[name]()
    model.config.is_causal = True
    assert moved(enable_bidirectional(model)).all()
    with bidirectional(model, enabled=False):
        assert not moved(model)[:-1].any()
