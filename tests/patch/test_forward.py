"""What the forward of a bidirectional model takes and gives."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
import transformers
from packaging.version import Version

from bidirect_patch import disable_bidirectional, enable_bidirectional

from ..helpers.references.plain_decoder import hidden_states
from ..helpers.seeing import CLOSE, IDS, MASK, hidden, sees_all
from ..helpers.tiny_models import each_family, tiny_model
from ..helpers.versions import TRANSFORMERS


@each_family
def test_attention_weights_and_hidden_states(make_model, family):
    model = enable_bidirectional(make_model(family, "eager"))
    with torch.no_grad():
        out = model(IDS, attention_mask=MASK, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2 and len(out.hidden_states) == 3
    real = MASK.bool()
    for weights in out.attentions:
        assert weights.shape == (2, 4, 8, 8)
        rows = weights.transpose(1, 2)[real]  # (real tokens, heads, key)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), **CLOSE)
        assert (weights[0].triu(1) + torch.ones(8, 8).tril() > 0).all()
        assert (weights[1, :, :5, 5:] == 0).all()
    for i, state in enumerate(out.hidden_states):
        moved = hidden_of_layer(model, i)
        assert (moved > 1e-6).any() == (i > 0), f"hidden_states[{i}]"
        assert state.shape == (2, 8, 32)


def hidden_of_layer(model, i):
    """How far hidden_states[i] of the first row moves at all positions but the last, when the last token changes."""
    other = IDS.clone()
    other[0, -1] = 60
    with torch.no_grad():
        a, b = (model(x, output_hidden_states=True).hidden_states[i] for x in (IDS, other))
    return (a - b)[0, :-1].abs()


def test_ways_to_call_it(make_model):
    model = enable_bidirectional(make_model(head=False))
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        embeds = model.embed_tokens(IDS)
        assert torch.equal(model(IDS, MASK).last_hidden_state, expected)
        assert torch.equal(model(IDS, MASK, return_dict=False)[0], expected)
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state, expected)
        positions = torch.arange(8)[None]
        assert torch.equal(model(IDS, MASK, position_ids=positions).last_hidden_state, expected)
        torch.testing.assert_close(model(IDS, MASK, positions.expand(2, -1))[0], expected, **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@each_family
def test_a_ready_4d_mask_is_taken_as_it_is(make_model, family, backend):
    """In the form that the installed transformers takes it: 1 and 0 before 4.40, 0 and the dtype's minimum since."""
    model = enable_bidirectional(make_model(family, backend))
    allowed = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    allowed |= torch.eye(8, dtype=torch.bool)
    ready = allowed[:, None].float()
    if TRANSFORMERS >= Version("4.40"):
        ready = torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        torch.testing.assert_close(hidden(model, attention_mask=ready), hidden_states(model, IDS, allowed), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
def test_half_precision_is_finite_and_close(make_model, backend, dtype):
    model = enable_bidirectional(make_model(backend=backend))
    with torch.no_grad():
        exact = hidden(model, IDS, MASK)
        half = hidden(model.to(dtype), IDS, MASK)
    assert half.dtype == dtype and half.isfinite().all()
    assert (half[MASK.bool()].float() - exact[MASK.bool()]).abs().mean() < 0.05
    assert not torch.equal(half[:, 0], hidden(disable_bidirectional(model), IDS, MASK)[:, 0])


def test_training_mode_sees_the_same(make_model):
    model = enable_bidirectional(make_model())
    with torch.no_grad():
        evaluated = hidden(model, IDS, MASK)
        assert model.train() is model and model.training
        torch.testing.assert_close(hidden(model, IDS, MASK), evaluated, **CLOSE)
    assert sees_all(model)


def test_a_causal_flag_of_the_config_changes_nothing(make_model):
    """From 5.2 on transformers puts it above the module's own."""
    model = enable_bidirectional(make_model("llama", "sdpa", is_causal=True))
    base = model.model if hasattr(model, "model") else model
    other = IDS.clone()
    other[:, -1] += 1
    assert not torch.equal(base(IDS)[0][:, 0], base(other)[0][:, 0])


def test_a_subclass_that_hands_on_all_arguments(make_model):
    class Own(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    plain = make_model(head=False)
    model = Own(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    enable_bidirectional(plain), enable_bidirectional(model)
    torch.testing.assert_close(model(IDS, MASK)[0], plain(IDS, MASK)[0])
    torch.testing.assert_close(model(IDS, attention_mask=MASK)[0], plain(IDS, attention_mask=MASK)[0])


def test_a_forward_keeps_nothing_of_its_callers_alive():
    model = enable_bidirectional(tiny_model(head=False))

    class Trainer:
        def step(self):
            kept = torch.nn.Linear(1, 1)
            alive = weakref.ref(kept)
            model(input_ids=torch.arange(5, 9)[None])
            del kept
            return alive() is not None

    assert not Trainer().step()
