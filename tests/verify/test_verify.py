"""Which classes and kernels the proof lets pass, whatever was proved before."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from bidirect_patch import disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import OrderError, UnsupportedModelError

from ..helpers.one_text import BOTH, CAUSAL, ONE_SINK, moves, output
from ..helpers.tiny_models import llama
from ..helpers.twins import leftovers
from ..helpers.versions import TRANSFORMERS


def test_attention_that_keeps_a_causal_mask_on_its_class_is_refused():
    kept = {}

    class Keeping(LlamaAttention):
        def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
            if attention_mask is not None and bool((attention_mask[:, :, -1] == 0).all()):
                attention_mask = kept.setdefault(hidden_states.shape[1], attention_mask[:1])
            return super().forward(hidden_states, *args, attention_mask=attention_mask, **kwargs)

    class Model(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            for i, layer in enumerate(self.layers):
                layer.self_attn = Keeping(config, i)

    model = llama(Model, "eager")
    with pytest.raises(UnsupportedModelError, match="small random model of its class"):
        enable_bidirectional(model)
    assert moves(model) == CAUSAL and not is_bidirectional(model)


def test_a_model_whose_layers_cannot_be_seen_is_refused_whatever_attention_was_put_in():
    class Twice(LlamaModel):
        """Runs its layers on more rows than it was given."""

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            masks = attention_mask if attention_mask is None else attention_mask.repeat(2, 1)
            out = super().forward(input_ids=input_ids.repeat(2, 1), attention_mask=masks, **kwargs)
            out.last_hidden_state = out.last_hidden_state[: len(input_ids)]
            return out

    class Own(type(llama(backend="eager").layers[0].self_attn)):
        """Adds nothing."""

    model = llama(Twice, "eager")
    model.layers[0].self_attn = Own(model.config, 0)
    with pytest.raises(UnsupportedModelError, match="nothing could be seen"):
        enable_bidirectional(model)
    assert not is_bidirectional(model)


@pytest.fixture
def causal_kernel():
    """The name of an attention function that is causal whatever it is told."""
    interface = getattr(transformers, "AttentionInterface", None)
    if interface is None:
        pytest.skip(f"transformers {TRANSFORMERS} takes no attention functions of users")

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    interface.register("always_causal", attend)
    yield "always_causal"
    interface._global_mapping.pop("always_causal")


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_a_kernel_is_not_believed_for_another_one_of_its_kind(causal_kernel, before):
    enable_bidirectional(llama(backend=before))
    model = llama(backend=causal_kernel)
    with pytest.raises(UnsupportedModelError, match="causal"):
        enable_bidirectional(model)
    assert not is_bidirectional(model)


def test_a_kernel_that_stays_causal_is_not_switched_to(causal_kernel):
    model = enable_bidirectional(llama())
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip(f"transformers {TRANSFORMERS} can't switch a model's backend")
    with pytest.raises(UnsupportedModelError, match="causal"):
        model.set_attn_implementation(causal_kernel)
    assert model.config._attn_implementation == "sdpa"
    assert moves(model) == BOTH and is_bidirectional(model)
    model.set_attn_implementation("eager")
    assert moves(model) == BOTH and is_bidirectional(model)


def test_a_kernel_that_nobody_verified_is_refused_where_the_config_names_it(causal_kernel):
    model = enable_bidirectional(llama())
    model.config._attn_implementation = causal_kernel
    assert not is_bidirectional(model)
    with pytest.raises(OrderError, match=f"set to '{causal_kernel}', with which it was not verified: call enable_bidirectional"):
        output(model)
    with pytest.raises(UnsupportedModelError, match="causal"):
        enable_bidirectional(model)
    model.config._attn_implementation = "eager"
    assert moves(model) == BOTH and is_bidirectional(model)
    model.config._attn_implementation = causal_kernel
    assert moves(disable_bidirectional(model)) == CAUSAL


def test_a_layer_that_names_such_a_kernel_and_a_compiled_model_are_refused_too(causal_kernel):
    model = enable_bidirectional(llama())
    compiled = torch.compile(model, backend="eager")
    assert moves(compiled) == BOTH
    model.config._attn_implementation = causal_kernel
    with pytest.raises(OrderError, match=f"set to '{causal_kernel}'"):
        output(compiled)
    torch._dynamo.reset()
    model = enable_bidirectional(llama())
    attention = model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = causal_kernel
    assert not is_bidirectional(model)
    with pytest.raises(OrderError, match=f"one LlamaAttention names attn_implementation='{causal_kernel}'"):
        output(model)


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_that_runs_only_later_is_verified_then(causal):
    interface = getattr(transformers, "AttentionInterface", None)
    if interface is None or not hasattr(LlamaModel, "set_attn_implementation"):
        pytest.skip(f"transformers {TRANSFORMERS} takes no attention functions of users, or can't switch a model's backend")
    runs = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if not runs:
            raise RuntimeError("needs another device")
        mask = None if causal else attention_mask
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    interface.register("later", attend)
    try:
        model = enable_bidirectional(llama(), num_sink_tokens=1)
        model.set_attn_implementation("later")
        runs.append(True)
        if causal:
            with pytest.raises(UnsupportedModelError, match="causal"):
                output(model)
        else:
            assert moves(model) == ONE_SINK and is_bidirectional(model)
    finally:
        interface._global_mapping.pop("later")


class Inverting(LlamaModel):
    """Takes a finished mask as ones (visible) and zeros: one that is added to the scores hides everything that it shows."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            least = torch.finfo(torch.float32).min
            attention_mask = (1.0 - attention_mask.to(torch.float32)) * least
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("sinks", [{}, {"num_sink_tokens": 1}, {"num_sink_tokens": 1, "num_sinkless_layers": 1}])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_mask_code_that_inverts_a_finished_mask_gets_one_that_it_can_invert_or_is_refused(backend, sinks):
    """With all hidden, each token sees all others alike: that looks bidirectional, whatever depends on what."""
    model, plain = llama(Inverting, backend), llama(backend=backend)
    plain.load_state_dict(model.state_dict())
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    enable_bidirectional(plain, **sinks)
    try:
        enable_bidirectional(model, **sinks)
    except UnsupportedModelError as error:
        assert "something else with the last token" in str(error) and moves(model) == CAUSAL
        return
    out, wanted = (m(ids, attention_mask=mask).last_hidden_state for m in (model, plain))
    torch.testing.assert_close(out[mask == 1], wanted[mask == 1])


def test_a_model_is_pickled_whatever_parts_another_of_its_class_had():
    class Own(torch.nn.Linear):
        """A local class, which no pickle finds."""

    first = llama()
    first.layers[0].self_attn.q_proj.__class__ = Own
    enable_bidirectional(first)
    with pytest.raises(AttributeError, match="Can't pickle local object|Can't get local object"):
        pickle.dumps(first)
    model = enable_bidirectional(llama())
    assert moves(pickle.loads(pickle.dumps(model))) == BOTH


class CausalLayer(LlamaDecoderLayer):
    """Makes a causal mask of its own."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min).triu(1)[None, None]
        return super().forward(hidden_states, attention_mask=mask, **kwargs)


class QuietLayer(LlamaDecoderLayer):
    """Adds nothing."""


def test_a_layer_of_the_users_own_is_seen_for_itself():
    model, quiet = llama(), llama()
    for i in range(2):
        model.layers[i] = CausalLayer(model.config, i).eval()
        quiet.layers[i] = QuietLayer(model.config, i).eval()
    with pytest.raises(UnsupportedModelError, match="CausalLayer"):
        enable_bidirectional(model)
    assert moves(model) == CAUSAL and not is_bidirectional(model) and not leftovers(model)
    assert moves(enable_bidirectional(quiet)) == BOTH
