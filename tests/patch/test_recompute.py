"""Gradient checkpointing and blocks: a backward pass runs layers again as they were in their forward, wherever it stands.

The oracle is the same model without checkpointing.
"""

import pytest
import torch
import torch.utils.checkpoint
from packaging.version import Version
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import OrderError, UnsupportedModelError

from ..helpers.gradients import assert_gradients
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import TRANSFORMERS

pytestmark = pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # a loss is a loss

IDS = torch.arange(5, 14).repeat(2, 1)
BATCHES = {
    "no mask": {},
    "ones": {"attention_mask": torch.ones_like(IDS)},
    "padded": {"attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).repeat(2, 1)},
}


def gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_embd=32, n_head=4, n_layer=2, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))


MODELS = {
    "llama": tiny_model,
    "eager": lambda: tiny_model("llama", "eager"),
    "windows": lambda: tiny_model("mistral", sliding_window=3),
    "qwen2": lambda: tiny_model("qwen2"),
    "gpt2": gpt2,  # a triangular buffer, on old releases
    "bloom": bloom,  # its masks are mirrored
}
each_reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])


def twin(name, reentrant=None):
    """A model in training, with checkpoints of a kind or without."""
    model = MODELS[name]().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model


def loss_of(model, batch):
    return model(input_ids=IDS, labels=IDS, use_cache=False, **BATCHES[batch]).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def causal(model, batch):
    with bidirectional(model, enabled=False):
        return loss_of(model, batch)


@each_reentrant
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sinks", [0, 1])
def test_the_backward_of_a_causal_block_may_stand_after_it(name, batch, reentrant, sinks):
    if batch == "packed" and (name == "bloom" or (name == "gpt2" and Version("4.53") > TRANSFORMERS)):
        pytest.skip("its own mask code takes no packed rows")
    plain = twin(name)
    want = gradients(plain, causal(plain, batch))
    model = enable_bidirectional(twin(name, reentrant), num_sink_tokens=sinks)
    got = gradients(model, causal(model, batch))
    assert_gradients(got, want)
    both = gradients(model, loss_of(model, batch))
    assert any(not torch.allclose(both[key], want[key], atol=1e-4) for key in want)


@each_reentrant
@pytest.mark.parametrize("name", ["llama", "windows"])
def test_a_generative_and_an_embedding_loss_in_one_step(name, reentrant):
    """GritLM's: a causal and a bidirectional forward, and one backward for both."""

    def joint(model):
        embedding = model(input_ids=IDS, use_cache=False, **BATCHES["padded"]).logits[:, :-1].tanh().mean()
        return gradients(model, causal(model, "no mask") + embedding)

    assert_gradients(joint(enable_bidirectional(twin(name, reentrant))), joint(enable_bidirectional(twin(name))))


@each_reentrant
def test_a_bidirectional_forward_whose_block_has_ended_is_refused(reentrant):
    model = twin("llama", reentrant)
    with bidirectional(model):
        want = gradients(model, loss_of(model, "no mask"))
        loss = loss_of(model, "no mask")
    with pytest.raises(OrderError, match=r"backward\(\) inside the block, `with bidirectional\(model\):`"):
        loss.backward()
    plain = enable_bidirectional(twin("llama"))
    assert_gradients(want, gradients(plain, loss_of(plain, "no mask")))


def test_undone_the_checkpoints_are_what_they_were():
    model = twin("llama", False)
    before = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    assert any(before)
    enable_bidirectional(model)
    gradients(model, causal(model, "ones") + loss_of(model, "ones"))
    disable_bidirectional(model)
    after = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    assert all(one is two for one, two in zip(before, after))
    with bidirectional(model):
        loss_of(model, "ones")
    after = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    assert all(one is two for one, two in zip(before, after))


FEW, MORE = dict(num_sink_tokens=1, num_sinkless_layers=1), dict(num_sink_tokens=1, num_sinkless_layers=2)


@each_reentrant
@pytest.mark.parametrize("name", ["llama", "eager", "windows"])
@pytest.mark.parametrize("then", [MORE, {}], ids=["more sinkless layers", "no sinks"])
def test_other_sinks_between_a_forward_and_its_backward(name, then, reentrant):
    model = twin(name, reentrant)
    try:
        enable_bidirectional(model, **FEW)
    except UnsupportedModelError as error:
        pytest.skip(f"this transformers has no sinkless layers for it: {error}")
    enable_bidirectional(model, **then)
    with bidirectional(model, **FEW):
        after_a_block = loss_of(model, "padded")
    got = gradients(model, after_a_block)
    enable_bidirectional(model, **FEW)
    loss = loss_of(model, "padded")
    enable_bidirectional(model, **then)
    again = gradients(model, loss)
    plain = enable_bidirectional(twin(name), **FEW)
    want = gradients(plain, loss_of(plain, "padded"))
    assert_gradients(got, want)
    assert_gradients(again, want)
    enable_bidirectional(plain, **then)
    other = gradients(plain, loss_of(plain, "padded"))
    assert any(not torch.allclose(other[key], want[key], atol=1e-4) for key in want)


def loss_of_states(forward, batch):
    """Of the states of real tokens that a decoder's forward gives."""
    states = forward(input_ids=IDS, use_cache=False, **BATCHES[batch])[0]
    return (states * BATCHES[batch].get("attention_mask", torch.ones_like(IDS))[..., None]).pow(3).mean()


@each_reentrant
@pytest.mark.parametrize("batch", ["no mask", "padded"])
@pytest.mark.parametrize("name", ["llama", "eager", "windows"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_a_forward_from_before_the_patch_has_the_gradients_that_it_has_without_checkpoints(name, batch, reentrant, sinks):
    model = twin(name, reentrant)
    forward = model.model.forward
    enable_bidirectional(model, num_sink_tokens=sinks)
    with pytest.raises(OrderError, match="taken before .* gradient checkpointing: call the model itself"):
        loss_of_states(forward, batch)  # nothing notes its layers
    gradients(model, loss_of(model, batch))
    plain = twin(name)
    plain_forward = plain.model.forward
    enable_bidirectional(plain, num_sink_tokens=sinks)
    want = gradients(plain, loss_of_states(plain_forward, batch))
    assert_gradients(gradients(model, loss_of_states(forward, batch)), want)  # now they are noted
    model.gradient_checkpointing_disable()
    loss = torch.utils.checkpoint.checkpoint(lambda: loss_of_states(forward, batch), use_reentrant=False)  # of all of it
    assert_gradients(gradients(model, loss), want)


class Stepping(LlamaForCausalLM):
    """A model that trains itself, so that its own method is under way in the backward pass."""

    def step(self, batch):
        return gradients(self, loss_of(self, batch))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_layers_in_wrappers_of_torch_and_a_backward_pass_within_a_method_of_the_model(backend, batch, sinks):
    def model():
        made = tiny_model("llama", backend).train()
        made.__class__ = Stepping
        return enable_bidirectional(made, num_sink_tokens=sinks)

    plain, wrapped = model(), model()
    layers = wrapped.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    got = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in wrapped.step(batch).items()}
    assert_gradients(got, plain.step(batch))
