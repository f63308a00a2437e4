"""The states out of few forwards, beside those of models that were cut and run as a whole."""

from copy import deepcopy

import pytest
import torch
from packaging.version import Version
from transformers import GPT2Config, GPT2Model

from bidirect_patch import bidirectional, is_bidirectional

from ...helpers.tiny_models import tiny_model
from ...helpers.versions import TRANSFORMERS

pytest.importorskip("datasets", reason="the command needs the extra [train]")

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0], [16, 17, 0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()
SMALL = {"num_hidden_layers": 4, "head": False}


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_head=4, n_layer=4, n_positions=32, initializer_range=0.3)
    return GPT2Model(config).eval()


MODELS = {
    "llama": lambda: tiny_model("llama", **SMALL),
    "eager": lambda: tiny_model("llama", "eager", **SMALL),
    "windows": lambda: tiny_model("mistral", sliding_window=3, **SMALL),
    "gemma": lambda: tiny_model("gemma", **SMALL),
    "gpt2": gpt2,
}


@pytest.fixture(params=["llama", "windows", *(pytest.param(n, marks=pytest.mark.slow) for n in ("eager", "gemma", "gpt2"))])
def model(request):
    if request.param == "windows" and Version("4.40") > TRANSFORMERS:
        pytest.skip(f"transformers {TRANSFORMERS}: a Mistral with windows is refused where its layers differ in sinks")
    return MODELS[request.param]()


def take_apart(model):
    from bidirect_patch.cli.sweep.parts import take_apart

    return take_apart(model, IDS[:1])


@torch.no_grad()
def honest(model, depth, **sinks):
    """What a cut model gives, run as a whole."""
    from bidirect_patch.cli.layers import keep_layers

    cut = deepcopy(model)
    keep_layers(cut, depth.layers)
    with bidirectional(cut, num_sinkless_layers=depth.blind, **sinks):
        return cut(input_ids=IDS, attention_mask=MASK)[0]


def found(model, family, depths):
    from bidirect_patch.cli.sweep.passes import states

    with torch.no_grad():
        return dict(states(take_apart(model), family, depths, IDS, MASK))


def same(one, two):
    torch.testing.assert_close(one[MASK.bool()], two[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_every_cut_model_with_a_sink(model):
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import SINK

    depths = [Depth(0, 3), Depth(0, 4), Depth(1, 1), Depth(1, 3), Depth(2, 2), Depth(2, 4)]
    for depth, state in found(model, SINK, depths).items():
        same(state, honest(model, depth, num_sink_tokens=1))
    for depth in (Depth(1, 1), Depth(2, 3)):  # one alone, of which only some layers are run
        same(found(model, SINK, [depth])[depth], honest(model, depth, num_sink_tokens=1))
    assert not is_bidirectional(model) and "forward" not in take_apart(model).layers[0].__dict__


def test_open_and_causal(model):
    from bidirect_patch.cli.layers import keep_layers
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import CAUSAL, OPEN

    depths = [Depth(0, layers) for layers in (1, 3, 4)]
    for depth, state in found(model, OPEN, depths).items():
        same(state, honest(model, depth))
    for depth, state in found(model, CAUSAL, depths).items():
        cut = deepcopy(model)
        keep_layers(cut, depth.layers)
        with torch.no_grad():
            same(state, cut(input_ids=IDS, attention_mask=MASK)[0])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_causal_model_whose_last_layer_does_not_see_the_first_token(backend):
    """After one layer that is the model without the token; the first token stays as it was."""
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import CAUSAL

    model = tiny_model("llama", backend, **SMALL)
    depth, seen = Depth(1, 1), Depth(0, 1)
    states = found(model, CAUSAL, [depth, seen])
    without = found_without_first(model)
    torch.testing.assert_close(states[depth][:, 1:][MASK[:, 1:].bool()], without[MASK[:, 1:].bool()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[depth][:, 0], states[seen][:, 0])
    assert not torch.allclose(states[depth][:, 1:], states[seen][:, 1:])


@torch.no_grad()
def found_without_first(model):
    from bidirect_patch.cli.layers import keep_layers

    cut = deepcopy(model)
    keep_layers(cut, 1)
    places = torch.arange(1, IDS.shape[1]).expand(len(IDS), -1)
    return cut(input_ids=IDS[:, 1:], attention_mask=MASK[:, 1:], position_ids=places)[0]


def test_a_model_whose_end_is_not_known_has_one_depth():
    from bidirect_patch.cli.sweep.measure import _depths
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import SINK

    model = tiny_model("llama", **SMALL)

    def double(module, args, output):
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.register_forward_hook(double)
    parts = take_apart(model)
    assert parts.after is None and set(_depths(parts, SINK)) == {Depth(0, 4), Depth(1, 4), Depth(2, 4)}
    for depth, state in found(model, SINK, _depths(parts, SINK)).items():
        same(state, honest(model, depth, num_sink_tokens=1))


def test_a_model_without_a_final_norm():
    model = tiny_model("llama", **SMALL)
    assert take_apart(model).after == [model.norm]
    model.norm = torch.nn.Identity()
    same(found(model, *_last())[_last()[1][0]], honest(model, _last()[1][0], num_sink_tokens=1))


def _last():
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import SINK

    return SINK, [Depth(1, 3)]
