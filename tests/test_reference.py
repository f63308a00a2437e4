"""Independent yardsticks: plain torch on every version, llm2vec's classes and the tutorial's where they run."""

import pytest
import torch
from packaging.version import Version

from bidirect_patch import enable_bidirectional

from .helpers.references.plain_decoder import hidden_states, next_token_loss, reach
from .helpers.tiny_models import FAMILIES
from .helpers.versions import BACKENDS, TRANSFORMERS

CLOSE = dict(atol=1e-5, rtol=1e-5)


def batch(padding="right"):
    """Three rows of 9, 6 and 1 real tokens: input_ids and attention_mask, int64 (3, 9)."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 61, (3, 9), generator=generator)
    lengths = torch.tensor([[9], [6], [1]])
    places = torch.arange(9) if padding == "right" else torch.arange(8, -1, -1)
    mask = (places < lengths).long()
    return input_ids * mask, mask


def mntp(padding="right"):
    """The batch with some tokens hidden behind 60: input_ids, attention_mask, and labels of the hidden ones."""
    input_ids, mask = batch(padding)
    hidden = (torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(9)) < 0.4) & mask.bool()
    hidden &= mask.cumsum(-1) > 1  # before a first token there is nothing that it could be predicted from
    return input_ids.masked_fill(hidden, 60), mask, input_ids.masked_fill(~hidden, -100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_decoder_is_the_stock_causal_model(make_model, family, backend):
    """The yardstick first, and with it the FlashAttention double: under a causal mask it is the stock model."""
    model = make_model(family, backend)
    sides = ["right", "left"]
    if backend == "flash_attention_3" and TRANSFORMERS < Version("4.54"):
        sides.remove("left")  # there stock drops the padding mask on the way to FlashAttention 3
    for side in sides:
        input_ids, mask = batch(side)
        with torch.no_grad():  # FlexAttention has no gradients on a CPU
            stock = model.model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        plain = hidden_states(model, input_ids, reach(mask.bool(), causal=True))
        torch.testing.assert_close(stock[mask.bool()], plain[mask.bool()], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_mntp_loss_is_the_plain_decoders(make_model, family, padding):
    input_ids, mask, labels = mntp(padding)
    model = make_model(family)
    with torch.no_grad():
        causal = model(input_ids, attention_mask=mask, labels=labels).loss
        enable_bidirectional(model)
        loss = model(input_ids, attention_mask=mask, labels=labels).loss
        plain = hidden_states(model, input_ids, reach(mask.bool()))
    torch.testing.assert_close(loss, next_token_loss(model, plain, labels), **CLOSE)
    assert abs(loss - causal) > 1e-3


def same_as_classes(reference, model, backend, padding):
    """The same weights in somebody's bidirectional `*ForMNTP` class: equal hidden states, loss and gradients."""
    reference.load_state_dict(model.state_dict())
    reference.eval()
    enable_bidirectional(model)
    input_ids, mask, labels = mntp(padding)
    real = mask.bool()
    outputs = []
    for m in (model, reference):
        m.zero_grad()
        out = m(input_ids, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False)
        out.loss.backward()
        outputs.append((out.loss, [h[real] for h in out.hidden_states], {n: p.grad for n, p in m.named_parameters()}))
    (loss, states, gradients), (their_loss, their_states, their_gradients) = outputs
    torch.testing.assert_close(loss, their_loss, **CLOSE)
    for state, theirs in zip(states, their_states, strict=True):
        torch.testing.assert_close(state, theirs, **CLOSE)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_equal_to_llm2vecs_classes(make_model, family, backend, padding):
    models = pytest.importorskip("llm2vec.models", reason="llm2vec isn't installed", exc_type=ImportError)
    if not Version("4.43.1") < TRANSFORMERS < Version("4.45"):
        pytest.skip(f"llm2vec 0.2.3's classes are written for transformers 4.44, not {TRANSFORMERS}")
    model = make_model(family, backend)
    reference = getattr(models, f"{FAMILIES[family]}BiForMNTP")._from_config(model.config, attn_implementation=backend)
    same_as_classes(reference, model, backend, padding)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_equal_to_the_tutorials_subclasses(make_model, backend, padding):
    if TRANSFORMERS >= Version("4.40"):
        pytest.skip(f"the tutorial's subclasses override what transformers 4.39 has and {TRANSFORMERS} doesn't")
    from .helpers.references.tutorial import LlamaBiForMNTP

    model = make_model("llama", backend)
    reference = LlamaBiForMNTP._from_config(model.config, attn_implementation=backend)
    same_as_classes(reference, model, backend, padding)
