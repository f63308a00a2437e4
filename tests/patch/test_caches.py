"""KV caches and `generate`."""

import contextlib
import functools

import pytest
import torch
import torch.utils.checkpoint
import transformers

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import CacheError, GenerateError

from ..helpers import one_text
from ..helpers.seeing import IDS, sees_all
from ..helpers.tiny_models import SIZES, causal_lm, each_family


@each_family
def test_no_cache_is_built_and_none_is_taken(make_model, family):
    model = make_model(family)
    model.config.use_cache = True
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        assert cache is not None
        enable_bidirectional(model)
        for kwargs in ({}, {"use_cache": True}):
            assert getattr(model(IDS, **kwargs), "past_key_values", None) is None
            assert getattr(model.model(IDS, **kwargs), "past_key_values", None) is None
        for given in (cache, transformers.DynamicCache()):
            with pytest.raises(CacheError, match="past_key_values|cache"):
                model(IDS, past_key_values=given)
            with pytest.raises(CacheError):
                model.model(IDS, None, None, given)
        assert model.config.use_cache is True
        disable_bidirectional(model)
        assert model(IDS, use_cache=True).past_key_values is not None


@each_family
def test_generate_is_refused_and_fine_in_an_island(make_model, family):
    model = make_model(family)
    generate = functools.partial(model.generate, IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    stock = generate()
    enable_bidirectional(model)
    with pytest.raises(GenerateError, match=r"with bidirectional\(model, enabled=False\)"):
        model.generate(IDS[:1], max_new_tokens=6)
    with pytest.raises(GenerateError):  # a method that was taken before the patch, too
        generate()
    with bidirectional(model, enabled=False):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0), stock)
    assert sees_all(model)
    disable_bidirectional(model)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0), stock)


def test_another_model_may_generate_meanwhile(make_model):
    model, other = make_model(), make_model()
    stock = other.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    with bidirectional(model):
        assert torch.equal(other.generate(IDS[:1], max_new_tokens=3, do_sample=False), stock)


@pytest.mark.parametrize("name", [n for n in ("Idefics2", "Idefics3", "SmolVLM") if hasattr(transformers, f"{n}Config")])
def test_a_model_around_the_decoder_makes_no_cache_for_it(name):
    """The outer model's own forward makes a cache, which its decoder would refuse."""
    config = getattr(transformers, f"{name}Config")()
    for part, sizes in ((config.text_config, SIZES), (config.vision_config, dict(num_hidden_layers=1, hidden_size=32))):
        for key, value in {**sizes, "num_attention_heads": 4, "intermediate_size": 48}.items():
            setattr(part, key, value)
    if hasattr(config, "perceiver_config"):  # of Idefics2
        for key, value in dict(hidden_size=32, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8).items():
            setattr(config.perceiver_config, key, value)
    config.image_token_id = 60
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        stock = model(IDS).logits
        enable_bidirectional(model)
        assert sees_all(model) and model(IDS, use_cache=True).past_key_values is None
        with bidirectional(model, enabled=False):
            assert torch.equal(model(IDS).logits, stock) and model(IDS).past_key_values is not None
            assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2
        assert sees_all(model)
        disable_bidirectional(model)
        assert torch.equal(model(IDS).logits, stock) and model(IDS).past_key_values is not None
    assert not any("bidirect" in key for module in model.modules() for key in vars(module))


def test_every_way_to_generate_is_refused():
    model = enable_bidirectional(causal_lm())
    for name in ("generate", "generate_batch"):
        if hasattr(model, name):
            with pytest.raises(GenerateError, match=name):
                getattr(model, name)(one_text.IDS)
    for name in ("generate_batch", "init_continuous_batching"):
        if hasattr(model, name):  # they generate in a thread of their own, for which the block does not hold
            with bidirectional(model, enabled=False), pytest.raises(GenerateError, match="disable_bidirectional"):
                getattr(model, name)(one_text.IDS.tolist())


@pytest.mark.skipif(not hasattr(transformers.LlamaForCausalLM, "init_continuous_batching"), reason="no continuous batching yet")
def test_what_generates_in_a_thread_and_was_made_before_is_refused():
    """It would log an error in its thread, and return nothing."""
    model = causal_lm()
    manager = model.init_continuous_batching()
    enable_bidirectional(model)
    for block in (contextlib.nullcontext(), bidirectional(model, enabled=False)):
        with block:
            with pytest.raises(GenerateError, match="Manager.start was called on a bidirectional model.*causal copy"):
                manager.start()
            with pytest.raises(GenerateError, match="Manager.add_request"):
                manager.add_request(one_text.IDS[0].tolist())
    disable_bidirectional(model)
    manager.add_request(one_text.IDS[0].tolist())
