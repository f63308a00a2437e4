"""Small models from configs of the sizes that are published: they build, run, and keep each kind of layer."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.tiny import tiny_like
from bidirect_patch.verify.report import attention_report

from ..helpers.published_configs import PUBLISHED, published
from ..helpers.slow import some_slow
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import TRANSFORMERS

# Kinds that the small model has to keep, by how far back each layer sees at length 9, where windows and chunks are 4.
REACHES = {
    "gemma-2-9b": {3, 8},
    "gemma-3-1b": {3, 8},
    "c4ai-command-r7b": {3, 8},
    "gpt-oss-20b": {3, 8},
    "Llama-4-Scout": {3, 8},
    "Ministral-8B": {3, 8},
    "gpt-neo-1.3B": {3, 8},
    "gemma-3n-E4B": {3, 8},
    "ModernBERT-decoder": {3, 8},
    "Phi-3-mini": {3},
    "Mistral-7B-v0.1": {3},
}


@pytest.mark.parametrize("name", some_slow(PUBLISHED, lambda name: name not in REACHES))
def test_published_sizes_shrink_and_run(name):
    config = published(name)
    before = config.to_dict()
    model = tiny_like(config)
    assert config.to_dict() == before
    assert type(model.config) is type(config)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    report = attention_report(model, length=9)
    assert {layer.verdict for layer in report.layers} == {"causal"}
    if TRANSFORMERS >= Version("4.48"):  # before, a window may be one longer, or count on one backend only
        assert {layer.backward for layer in report.layers} == REACHES.get(name, {8})
    assert 2 <= len(report.layers) <= 6


def test_each_kind_of_mlp_is_kept():
    model = tiny_like(published("DeepSeek-V3"))
    kinds = {type(layer.mlp).__name__ for layer in model.model.layers}
    assert len(kinds) == 2


def test_a_model_gives_class_dtype_and_backend():
    model = tiny_model("llama", "eager", head=False, num_hidden_layers=5).to(torch.bfloat16)
    small = tiny_like(nn.Sequential(model))
    assert type(small) is type(model) and small is not model
    assert small.dtype == torch.bfloat16 and small.config._attn_implementation == "eager"
    assert len(small.layers) == 2 and len(model.layers) == 5


def test_a_model_on_the_meta_device_gives_one_on_cpu():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(published("SmolLM2-135M"))
    small = tiny_like(model)
    assert {p.device.type for p in small.parameters()} == {"cpu"}
    assert {layer.verdict for layer in attention_report(small).layers} == {"causal"}


def test_random_state_is_left_alone_and_weights_repeat():
    config = published("SmolLM2-135M")
    state = torch.get_rng_state()
    first, second = tiny_like(config), tiny_like(config)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.std() > 0 for p in first.parameters())  # nothing starts at zero, where nothing moves


def test_deepspeed_does_not_partition_it():
    """Under ZeRO-3 transformers builds models of partitioned weights, which run in DeepSpeed's engine alone."""
    from transformers.integrations import deepspeed

    class Stage3:
        def is_zero3(self):
            return True

    model, config = tiny_model(head=False), Stage3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert all(p.numel() for p in tiny_like(model).parameters())
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_a_config_that_does_not_build_is_refused():
    config = published("SmolLM2-135M")
    config.hidden_act = "no such function"
    with pytest.raises(UnsupportedModelError, match="LlamaConfig.*no such function"):
        tiny_like(config)
    with pytest.raises(UnsupportedModelError, match="Linear holds no transformers model"):
        tiny_like(nn.Linear(2, 2))
