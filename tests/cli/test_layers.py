"""A model of fewer layers, in memory and opened from what it saves."""

import pytest
import torch
from transformers import AutoConfig

from bidirect_patch.cli.layers import check_layers, keep_layers, number_of_layers
from bidirect_patch.errors import ConfigError
from bidirect_patch.model.find import decoders

from ..helpers import zoo
from ..helpers.slow import some_slow
from ..helpers.tiny_models import tiny_config, tiny_model

# Why a family's layers can't be cut, where a release builds it; what is refused is refused before anything changes.
REFUSED = ("dory", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
REFUSED += ("gpt_neox_japanese", "hrm_text", "longcat_flash", "olmo_hybrid", "qwen4_exp", "qwen4_exp_text")
NO_DECODER = ("cpmant", "falcon_mamba", "mamba", "mamba2", "mega", "reformer", "rwkv", "xlnet", "xlstm", "gpt_neox_japanese")
UNLIKE = ("llama", "gpt_neo", "gemma3", "gemma2", "opt", "bart", "xlm", "bloom", "mpt", "gpt_oss", "llama4_text", "minicpm3")
ODD = ("blt", "mllama", "zamba", "zamba2")  # several decoders, or layers that share weights: cut at some numbers alone
CUT = [t for t in zoo.buildable_types() if t not in {*REFUSED, *NO_DECODER, *ODD}]


def outputs(model, ids):
    with torch.no_grad():
        out = model(**ids)
    return out.logits if "logits" in out else out[0]


@pytest.mark.parametrize("model_type", some_slow(CUT, lambda model_type: model_type not in UNLIKE))
def test_what_is_saved_opens_as_what_it_was(model_type, tmp_path):
    model = zoo.build(model_type)
    ids = zoo.inputs(model, 2, 8)
    count = number_of_layers(decoders(model)[0].module.config) - 1
    whole = outputs(model, ids)
    keep_layers(model, count)
    decoder = decoders(model)[0]
    holder = decoder.attentions[0].layer.rpartition(".")[0]
    assert len(decoder.module.get_submodule(holder)) == number_of_layers(decoder.module.config) == count
    cut = outputs(model, ids)
    assert not torch.allclose(cut, whole, atol=1e-3)
    model.save_pretrained(tmp_path)
    opened, loading = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(loading.values())
    if model_type != "youtu":  # whose saved model is another one with all its layers too
        torch.testing.assert_close(outputs(opened.eval(), ids), cut, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in REFUSED if t in zoo.buildable_types()])
def test_a_model_whose_other_weights_depend_on_the_layers_is_refused_as_it_is(model_type):
    model = zoo.build(model_type)
    before, names = str(model.config), list(model.state_dict())
    with pytest.raises(ConfigError, match="layers: .* (can't be cut|could be cut)"):
        keep_layers(model, 1)
    assert str(model.config) == before and list(model.state_dict()) == names


def test_the_states_are_those_before_the_layers_that_are_cut():
    model = tiny_model(num_hidden_layers=4)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        keep_layers(model, 3)
        torch.testing.assert_close(model.model(ids)[0], model.model.norm(states[3]), rtol=0, atol=0)
    assert model.config.num_hidden_layers == 3


def test_the_layers_of_each_kind_follow():
    model = zoo.build("gemma3_text") if "gemma3_text" in zoo.model_types() else pytest.skip("this release has no Gemma 3")
    kinds = list(getattr(model.config, "layer_types", None) or [])
    keep_layers(model, 2)
    assert list(getattr(model.config, "layer_types", None) or []) == kinds[:2]


def test_all_layers_are_no_change():
    model = tiny_model()
    layers, config = list(model.model.layers), str(model.config)
    keep_layers(model, 2)
    assert list(model.model.layers) == layers and str(model.config) == config


def test_more_layers_than_there_are():
    model = tiny_model()
    for check in (lambda: keep_layers(model, 3), lambda: check_layers(tiny_config("llama"), 3)):
        with pytest.raises(ConfigError, match="layers must be at most 2, the model's; got 3"):
            check()
    assert len(model.model.layers) == 2
    check_layers(AutoConfig.for_model("mamba"), 1)
