"""Configs of published sizes made small: ratios and each kind of layer stay."""

import copy
import time

import pytest
import transformers

from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model import shrink as shrink_module
from bidirect_patch.model.tiny import shrink, tiny_like

from ..helpers.published_configs import published


def test_ratios_are_kept():
    small = shrink(published("Llama-3-8B"))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 1)
    assert (small.hidden_size, small.intermediate_size) == (64, 224)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("head_dim", -16),
        ("intermediate_size", -1),
        ("vocab_size", 0),
    ],
)
def test_a_size_that_is_zero_or_negative_is_named(name, value):
    config = published("SmolLM2-135M")
    setattr(config, name, value)
    for build in (shrink, tiny_like):
        with pytest.raises(UnsupportedModelError, match=f"^LlamaConfig has {name} = {value}; "):
            build(config)


LAYERS = {
    "pattern": dict(sliding_window_pattern=6),
    "period and index": dict(decoder_sparse_step=3, mlp_only_layers=[2, 4999], first_k_dense_replace=3),
    "last": dict(num_kv_shared_layers=15),
    "repeated list": dict(layer_types=["a", "b", "a", "c"], no_rope_layers=[]),
    "repeated lists": dict(layer_types=["a", "b", "c"], mlp_layer_types=["x", "y", "y", "y", "y"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_layer_of_each_kind_is_kept(name):
    config = transformers.PretrainedConfig()
    for field, value in (LAYERS[name] | {"num_hidden_layers": 5000}).items():
        setattr(config, field, copy.deepcopy(value))
    layers = shrink_module._read_layers(config, {4000: "other"})
    first = {layers.kind(layer): layer for layer in reversed(range(5000))}
    assert layers.first_of_each_kind() == sorted(first.values())
    assert len(layers._candidates()) < 200  # not one after the other


def test_ten_million_layers_are_shrunk_at_once():
    config = published("SmolLM2-135M")
    config.num_hidden_layers = 10**7
    start = time.perf_counter()
    assert shrink(config).num_hidden_layers == 2
    assert time.perf_counter() - start < 1
