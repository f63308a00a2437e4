"""SDPA over packed rows, document by document: the same numbers as each document alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bidirect_patch import enable_bidirectional
from bidirect_patch.attention import packed_sdpa as packed
from bidirect_patch.attention.padding_and_packing import read_sequences
from bidirect_patch.attention.ready_mask import make_mask, pick
from bidirect_patch.attention.versions import READY_MASKS_ARE_INVERTED
from bidirect_patch.model.windows import Span

from ..helpers.tiny_models import FAMILIES, tiny_model

LENGTHS = (3, 1, 9, 5)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
IDS = torch.randint(3, 61, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture
def by_document(monkeypatch):
    """Makes rows as short as these run document by document; a list of the document's lengths, one entry a call."""
    monkeypatch.setattr(packed, "PAIRS_PER_CALL", -1)
    calls, attention = [], packed._attention

    def spy(query, key, value, attn_mask=None, *args, **kwargs):
        calls.append(tuple(attn_mask.sequences.lengths))
        return attention(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(packed, "_attention", spy)
    return calls


def hidden(model, ids, **kwargs):
    return model(input_ids=ids, output_hidden_states=True, **kwargs).hidden_states[-1]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("family, window", [*((f, None) for f in FAMILIES), ("mistral", 4)])
def test_outputs_and_gradients_are_those_of_each_document_alone(by_document, family, window, checkpointing):
    model = enable_bidirectional(tiny_model(family, **({"sliding_window": window} if window else {})))
    parameters = list(model.model.parameters())
    alone = torch.cat([hidden(model, part) for part in IDS.split(LENGTHS, 1)], 1)
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    want = torch.autograd.grad((alone * weight).sum(), parameters)
    by_document.clear()  # what enabling looked at
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    found = hidden(model, IDS, position_ids=POSITIONS)
    if not READY_MASKS_ARE_INVERTED:  # there some families make another mask of ours, and it is no faster
        assert by_document == [LENGTHS] * model.config.num_hidden_layers
    torch.testing.assert_close(found, alone, **CLOSE)
    (found * weight).sum().backward()
    for parameter, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("span", [Span(), Span(window=3), Span(chunk=4), Span(chunk=4, window=2)], ids=str)
def test_one_call_gives_what_the_plain_mask_gives(by_document, span):
    sequences = read_sequences(None, POSITIONS, None, *IDS.shape, IDS.device)
    mask = pick(make_mask(sequences, (span,), "sdpa", torch.float32), 0, 1, False)
    assert isinstance(mask, packed.PackedMask)
    plain = pick(make_mask(sequences, (span,), "eager", torch.float32), 0, 1, False)
    assert type(plain) is torch.Tensor
    q, k, v = torch.randn(3, 1, 2, IDS.shape[1], 8, generator=torch.Generator().manual_seed(1))
    want = scaled_dot_product_attention(q, k, v, plain, scale=0.3)
    for given in (mask, mask[:, :, :, : k.shape[-2]]):
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, given, scale=0.3), want, **CLOSE)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.3), want, **CLOSE)
    assert len(by_document) == 4


def test_to_anything_else_it_is_the_plain_mask(by_document):
    """Fewer queries than keys, two rows that share the mask, arithmetic: what models do to masks."""
    sequences = read_sequences(None, POSITIONS, None, *IDS.shape, IDS.device)
    mask = pick(make_mask(sequences, (Span(),), "sdpa", torch.float32), 0, 1, False)
    plain = mask.as_subclass(torch.Tensor)
    q, k, v = torch.randn(3, 2, 2, IDS.shape[1], 8, generator=torch.Generator().manual_seed(1))
    assert type(mask[:, :, 2:4]) is type(mask[0]) is torch.Tensor
    few = slice(2, 4)
    for x, m, p in ((q, mask, plain), (q[:, :, few], mask[:, :, few], plain[:, :, few]), (q, mask.clone(), plain)):
        assert torch.equal(scaled_dot_product_attention(x, k, v, m), scaled_dot_product_attention(x, k, v, p))


def test_a_row_too_short_to_gain_is_one_call():
    sequences = read_sequences(None, POSITIONS, None, *IDS.shape, IDS.device)
    mask = pick(make_mask(sequences, (Span(),), "sdpa", torch.float32), 0, 1, False)
    assert type(mask) is torch.Tensor
