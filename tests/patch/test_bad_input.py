"""Bad input is refused by name, and nothing is changed."""

import pytest
import torch
import torch.utils.checkpoint
import transformers
from packaging.version import Version
from torch import nn

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ArgumentError, AttentionMaskError, BidirectPatchError, UnsupportedModelError

from ..helpers import one_text
from ..helpers.seeing import IDS, hidden, reached, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import llama, tiny_config
from ..helpers.versions import TRANSFORMERS


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(attention_mask=torch.ones(2, 8, 8)),
        dict(attention_mask=torch.ones(8)),
        dict(attention_mask=torch.ones(2, 9)),
        dict(attention_mask=torch.ones(2, 5)),
        dict(attention_mask=torch.ones(3, 8)),
        dict(attention_mask=torch.ones(2, 1, 8, 5)),
        dict(position_ids=torch.arange(9)[None]),
        dict(position_ids=torch.arange(8).expand(3, 8)),
    ],
    ids=lambda kwargs: "-".join(f"{k}{tuple(v.shape)}" for k, v in kwargs.items()),
)
def test_a_mask_of_another_shape_is_refused(make_model, backend, kwargs):
    model = enable_bidirectional(make_model(backend=backend))
    [(name, value)] = kwargs.items()
    with pytest.raises(AttentionMaskError) as caught:
        model(IDS, **kwargs)
    assert name in str(caught.value)
    assert str(tuple(value.shape)) in str(caught.value), "the message gives the shape"
    assert isinstance(caught.value, ValueError)
    assert sees_all(model)


def config_of(name, **settings):
    return getattr(transformers, f"{name}Config")(vocab_size=61, num_hidden_layers=1, hidden_size=32, **settings)


def refused(kind):
    heads = dict(num_attention_heads=4, intermediate_size=32)
    if kind == "bert":
        return transformers.BertModel(config_of("Bert", **heads)), "Bert"
    if kind == "t5":
        sizes = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), "T5"
    if kind == "mamba":
        return transformers.MambaForCausalLM(config_of("Mamba", state_size=4, expand=2, conv_kernel=2)), "Mamba"
    return nn.Sequential(nn.Linear(4, 4)), "Sequential"


@pytest.mark.parametrize("kind", ["bert", "t5", "mamba", "no-decoder"])
def test_what_cannot_be_bidirectional_is_refused_by_name(kind):
    model, name = refused(kind)
    modules = [(n, type(m), dict(vars(m))) for n, m in model.named_modules()]
    for verb in (enable_bidirectional, lambda m: bidirectional(m).__enter__()):
        with pytest.raises(UnsupportedModelError, match=name) as caught:
            verb(model)
        assert isinstance(caught.value, TypeError)
        if kind == "mamba":
            assert any(layer in str(caught.value) for layer in ("MambaBlock", "MambaMixer")), "the layers are named"
    assert [(n, type(m), dict(vars(m))) for n, m in model.named_modules()] == modules
    assert not is_bidirectional(model) or kind == "bert"


def test_a_module_with_one_unsupported_part_stays_whole(make_model):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.mamba = make_model(), refused("mamba")[0]

    both = Both()
    before = snapshot(both.fine)
    with pytest.raises(UnsupportedModelError, match="Mamba"):
        enable_bidirectional(both)
    assert_same(before, snapshot(both.fine))
    assert sees_only_the_past(both.fine)


@pytest.mark.parametrize("thing", [None, "gpt2", {}, transformers.LlamaModel], ids=["None", "str", "dict", "class"])
@pytest.mark.parametrize("verb", [enable_bidirectional, disable_bidirectional, bidirectional, is_bidirectional])
def test_what_is_no_module_is_refused(thing, verb):
    with pytest.raises(BidirectPatchError) as caught:
        result = verb(thing)
        if verb is bidirectional:
            result.__enter__()
    assert isinstance(caught.value, TypeError)
    assert type(thing).__name__ in str(caught.value)


def test_a_checkpoint_that_says_so_is_bidirectional_where_transformers_honours_it():
    model = transformers.LlamaModel(tiny_config("llama", is_causal=False)).eval()
    native = TRANSFORMERS >= Version("5.2")
    other = IDS.clone()
    other[:, -1] = 60
    with torch.no_grad():
        assert (not torch.equal(hidden(model)[:, 0], hidden(model, other)[:, 0])) == native, "transformers' own doing"
    assert is_bidirectional(model) == native
    enable_bidirectional(model)
    with torch.no_grad():
        assert not torch.equal(hidden(model)[:, 0], hidden(model, other)[:, 0])
    assert model.config.is_causal is False


def test_a_window_and_padding_in_the_middle_are_refused_on_flash(make_model):
    model = enable_bidirectional(make_model("mistral", "flash_attention_2", sliding_window=3))
    mask = torch.ones_like(IDS)
    mask[:, 3:5] = 0
    with pytest.raises(AttentionMaskError, match="middle of a row"):
        hidden(model, attention_mask=mask)


@pytest.mark.parametrize(
    "sinks",
    [
        *(dict(num_sink_tokens=bad) for bad in (True, 1.0, -1, "1", None, [1], 2**31, 10**30)),
        *(dict(num_sink_tokens=1, num_sinkless_layers=bad) for bad in (False, 1.0, -1, "1", None, 3)),
        dict(num_sinkless_layers=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("found", [None, dict(num_sink_tokens=2)], ids=["causal", "with-sinks"])
def test_numbers_of_sinks_that_mean_nothing_are_refused(make_model, sinks, found):
    model = make_model()
    if found:
        enable_bidirectional(model, **found)
    seen = reached(model)
    before = snapshot(model)
    name = "num_sinkless_layers" if "num_sinkless_layers" in sinks else "num_sink_tokens"
    for verb in (enable_bidirectional, lambda *args, **kwargs: bidirectional(*args, **kwargs).__enter__()):
        with pytest.raises(ArgumentError, match=name) as caught:
            verb(model, **sinks)
        assert isinstance(caught.value, (TypeError, ValueError))
    assert_same(before, snapshot(model))
    assert torch.equal(reached(model), seen)


def test_a_causal_block_takes_no_sinks(make_model):
    with pytest.raises(ArgumentError, match="num_sink_tokens=1"):
        bidirectional(make_model(), enabled=False, num_sink_tokens=1)


def test_numbers_of_sequences_are_no_mask_of_ones():
    model = enable_bidirectional(llama())
    with pytest.raises(AttentionMaskError, match="position_ids"):
        model(one_text.IDS, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]]))


def test_attention_without_a_mask_is_called_that():
    class PlainAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(32, 32)

        def forward(self, hidden_states, **kwargs):
            return self.proj(hidden_states), None

    model = llama()
    for layer in model.layers:
        layer.self_attn = PlainAttention()
    with pytest.raises(UnsupportedModelError, match="take no mask"):
        enable_bidirectional(model)
