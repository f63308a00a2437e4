"""Models whose config makes them bidirectional, in whole or in part: `is_causal=False`, and Gemma's own setting."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import OrderError

from ..helpers.one_text import BOTH, CAUSAL, moves
from ..helpers.tiny_models import SIZES, causal_lm, llama
from ..helpers.versions import TRANSFORMERS

each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])
needs_native = pytest.mark.skipif(
    TRANSFORMERS < Version("5.2"), reason="before 5.2 no config makes a model bidirectional"
)


def gemma3(backend="sdpa", **settings):
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=64, **settings)
    return transformers.Gemma3TextModel._from_config(config, attn_implementation=backend).eval()


@each_backend
@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="Gemma has no use_bidirectional_attention before 4.57")
def test_use_bidirectional_attention_is_known(backend):
    model = gemma3(backend, use_bidirectional_attention=True)
    assert moves(model) == BOTH and is_bidirectional(model)
    enable_bidirectional(model)
    assert moves(model) == BOTH and is_bidirectional(model)
    packed = moves(model, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    assert packed == "000011111"
    with pytest.raises(OrderError, match="use_bidirectional_attention"):
        disable_bidirectional(model)
    assert is_bidirectional(model)


@each_backend
@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="Gemma has no use_bidirectional_attention before 4.57")
def test_what_its_config_makes_bidirectional_in_part_is_never_called_causal(backend):
    """Gemma 1 from 5.2 on, but on eager: without padding it is bidirectional, with padding causal."""
    config = transformers.GemmaConfig(**SIZES, use_bidirectional_attention=True)
    model = transformers.GemmaModel._from_config(config, attn_implementation=backend).eval()
    stock = moves(model)
    assert not is_bidirectional(model)
    assert moves(enable_bidirectional(model)) == BOTH
    if stock == CAUSAL:
        with bidirectional(model, enabled=False):
            assert moves(model) == CAUSAL
        assert moves(disable_bidirectional(model)) == CAUSAL
        return
    with pytest.raises(OrderError, match="use_bidirectional_attention"):
        disable_bidirectional(model)
    with pytest.raises(OrderError, match="use_bidirectional_attention"), bidirectional(model, enabled=False):
        pass
    assert moves(model) == BOTH and is_bidirectional(model)


@needs_native
def test_disabling_what_its_config_makes_bidirectional_is_an_error():
    model = llama(is_causal=False)
    assert moves(model) == BOTH and is_bidirectional(model)
    with pytest.raises(OrderError, match="is_causal=True"):
        disable_bidirectional(model)
    with bidirectional(model, enabled=False):
        assert moves(model) == CAUSAL and not is_bidirectional(model)


@needs_native
def test_what_is_saved_in_a_causal_block_is_causal(tmp_path):
    model = causal_lm()
    model.config.is_causal = False
    assert is_bidirectional(model)
    with bidirectional(model, enabled=False):
        model.save_pretrained(tmp_path)
    assert is_bidirectional(model) and model.config.is_causal is False
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert moves(opened) == CAUSAL and not is_bidirectional(opened)


@needs_native
def test_edits_and_copies_of_a_config_in_a_causal_block_last():
    model = llama(is_causal=False)
    with bidirectional(model, enabled=False):
        model.config.use_cache = False
        copied = copy.deepcopy(model)
    assert model.config.use_cache is False and model.config.is_causal is False
    assert type(copied.config) is type(model.config) and copied.config.is_causal is True
    disable_bidirectional(copied)
    assert moves(copied) == CAUSAL and moves(model) == BOTH
