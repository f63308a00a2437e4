"""KV caches and `generate`."""

import functools

import pytest
import torch
import torch.utils.checkpoint
import transformers

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import CacheError, GenerateError

from ..helpers.seeing import IDS, sees_all
from ..helpers.tiny_models import each_family


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
