"""Layers that are shared with another model, were away while the mode changed, or come in during a block."""

import copy

import pytest
import torch
import transformers
from torch import nn

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ArgumentError, UnsupportedModelError

from ..helpers.one_text import BOTH, CAUSAL, moves, output
from ..helpers.tiny_models import SIZES, llama
from ..helpers.twins import assert_twins, leftovers
from ..helpers.versions import TRANSFORMERS


def test_a_model_whose_layers_are_anothers_is_brought_to_one_state():
    a, b = llama(), llama()
    b.layers = a.layers
    enable_bidirectional(a)
    assert not is_bidirectional(b)
    assert moves(enable_bidirectional(b)) == BOTH and is_bidirectional(b) and is_bidirectional(a)
    disable_bidirectional(b)
    assert not is_bidirectional(a) and moves(b) == CAUSAL
    disable_bidirectional(a)
    assert moves(a) == moves(b) == CAUSAL


def test_a_layer_that_was_away_is_brought_along():
    model, twin = llama(), llama()
    twin.load_state_dict(model.state_dict())
    enable_bidirectional(model)
    layer = model.layers.pop(1)
    twin.layers.append(twin.layers.pop(1))
    disable_bidirectional(model)
    model.layers.append(layer)
    assert not is_bidirectional(model)
    assert moves(enable_bidirectional(model)) == BOTH and is_bidirectional(model)
    assert_twins(disable_bidirectional(model), twin)
    model.layers[0] = copy.deepcopy(enable_bidirectional(llama()).layers[0])
    assert not is_bidirectional(model)
    assert moves(disable_bidirectional(model)) == CAUSAL


def gemma2():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 2, "head_dim": 16, "sliding_window": 3}
    return transformers.Gemma2Model._from_config(transformers.Gemma2Config(**sizes), attn_implementation="eager").eval()


@pytest.mark.skipif(not hasattr(transformers, "Gemma2Config"), reason=f"transformers {TRANSFORMERS} has no Gemma 2")
def test_a_layer_that_came_in_a_causal_block_is_brought_along():
    """As many heads as windows: a stock layer would take the mask of each window for the mask of a head."""
    want = output(enable_bidirectional(gemma2()))
    model = enable_bidirectional(gemma2())
    with bidirectional(model, enabled=False):
        model.layers[1] = copy.deepcopy(model.layers[1])
    assert is_bidirectional(model)
    torch.testing.assert_close(output(model), want)
    disable_bidirectional(model)
    assert moves(model) == CAUSAL and not leftovers(model)


class HeldHere(nn.ModuleList):
    """The layers of one stage of a pipeline: those of the other stages are None, and are not run."""

    def __iter__(self):
        return (layer for layer in self._modules.values() if layer is not None)


def stages(model, cut):
    """The two stages of a copy of a Llama: the layers before `cut`, and the others with the norm."""
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    layers = [*model.layers]
    first.layers = HeldHere([*copy.deepcopy(layers[:cut]), *[None] * (len(layers) - cut)])
    second.layers = HeldHere([*[None] * cut, *copy.deepcopy(layers[cut:])])
    first.norm = nn.Identity()
    return first, second


def through(first, second):
    return output(second, None, inputs_embeds=output(first))


@pytest.mark.parametrize("when", ["before", "after"])
def test_sinkless_layers_of_a_pipeline_are_counted_from_the_end_of_the_whole(when):
    """Enabled before or after the model is cut into stages."""
    model = llama(num_hidden_layers=4)
    for sinkless in range(5):
        sinks = dict(num_sink_tokens=1, num_sinkless_layers=sinkless)
        whole = enable_bidirectional(copy.deepcopy(model), **sinks)
        parts = stages(whole, 2) if when == "before" else stages(model, 2)
        if when == "after":
            for part in parts:
                enable_bidirectional(part, **sinks)
        assert torch.equal(through(*parts), output(whole)) and all(map(is_bidirectional, parts))
        for part in parts:
            with bidirectional(part, enabled=False):
                pass
        assert torch.equal(through(*parts), output(whole)) and all(map(is_bidirectional, parts))
    with pytest.raises(ArgumentError, match="has 4 layers"):
        enable_bidirectional(parts[0], num_sink_tokens=1, num_sinkless_layers=5)


def test_sinkless_layers_where_a_missing_layer_may_have_no_attention():
    stage, _ = stages(llama(num_hidden_layers=4), 2)
    stage.layers[0] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="lacks some layers.*num_sinkless_layers=0"):
        enable_bidirectional(stage, num_sink_tokens=1, num_sinkless_layers=1)
    assert is_bidirectional(enable_bidirectional(stage, num_sink_tokens=1))
