"""The contract of enable_bidirectional, disable_bidirectional, bidirectional and is_bidirectional."""

import copy
import functools
import inspect
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
import transformers
from packaging.version import Version
from torch import nn

import bidirect_patch
from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import (
    AttentionMaskError,
    BidirectPatchError,
    CacheError,
    ForeignWrapperError,
    GenerateError,
    ModeConflictError,
    OrderError,
    UnsupportedModelError,
)

from ..conftest import TRANSFORMERS, tiny_config
from ..helpers.references.plain_decoder import hidden_states, reach

CLOSE = dict(atol=1e-5, rtol=1e-5)
FAMILIES = ["llama", "mistral", "gemma", "qwen2"]
each_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.tensor([[5, 17, 33, 8, 41, 26, 12, 9], [7, 22, 14, 50, 3, 0, 0, 0]])
MASK = (IDS != 0).long()


def hidden(model, input_ids=IDS, attention_mask=None, **kwargs):
    """Last hidden states, (batch, seq, hidden), of a bare model or a *ForCausalLM, however it is wrapped."""
    out = model(input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
    return out.hidden_states[-1]


def reached(model, ids=IDS[:1], position_ids=None):
    """bool (query, key): whether changing the token at `key` moves what comes out at `query`."""
    seq = ids.shape[1]
    rows = ids.repeat(1 + seq, 1)
    rows[torch.arange(seq) + 1, torch.arange(seq)] = 60
    positions = {} if position_ids is None else {"position_ids": position_ids.expand(1 + seq, -1)}
    with torch.no_grad():
        out = hidden(model, rows, **positions)
    return ((out[1:] - out[0]).abs().amax(-1) > 1e-6).T


def sees_all(model):
    return bool(reached(model).all())


def sees_only_the_past(model):
    return torch.equal(reached(model), torch.ones(8, 8, dtype=torch.bool).tril())


class Same:
    """An object that is equal to itself alone (and is kept alive, so that its id isn't given to another)."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self):
        return f"<{type(self.value).__name__}>"


def seen(value, depth=2):
    """Containers by content, plain values by value, all else by identity."""
    if isinstance(value, dict) and depth:
        return {k: seen(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and depth:
        return [seen(v, depth - 1) for v in value]
    return value if isinstance(value, (bool, int, float, str, torch.dtype)) else Same(value)


def snapshot(model):
    """What there is to see: each module's class and attributes, the buffers' values, the config."""
    modules = {name: (type(module), seen(vars(module))) for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return modules, buffers, copy.deepcopy(model.config.to_dict()), seen(vars(model.config))


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (cls, attributes) in before[0].items():
        assert after[0][name][0] is cls, f"the class of {name!r}"
        assert after[0][name][1] == attributes, f"the attributes of {name!r}"
    assert before[1].keys() == after[1].keys()
    for name, buffer in before[1].items():
        assert torch.equal(buffer, after[1][name]), f"the buffer {name}"
    assert before[2:] == after[2:], "the config"


def test_a_snapshot_sees_what_changed(make_model):
    """The tests below lean on it, so it must be able to fail."""
    model = make_model()
    attention = model.model.layers[0].self_attn
    cls = type(attention)
    twin = type(cls.__name__, (cls,), {})
    before = snapshot(model)
    for change, undo in (
        (lambda: setattr(attention, "extra", 1), lambda: delattr(attention, "extra")),
        (lambda: setattr(attention, "is_causal", False), lambda: setattr(attention, "is_causal", True)),
        (lambda: setattr(attention, "__class__", twin), lambda: setattr(attention, "__class__", cls)),
        (lambda: setattr(model.config, "is_causal", False), lambda: delattr(model.config, "is_causal")),
    ):
        change()
        with pytest.raises(AssertionError):
            assert_same(before, snapshot(model))
        undo()
        assert_same(before, snapshot(model))
    handle = attention.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))
    handle.remove()


# --- what bidirectional means ---


@each_family
@pytest.mark.parametrize("head", [True, False], ids=["causal-lm", "bare"])
def test_every_token_reaches_every_token(make_model, family, head):
    model = make_model(family, head=head)
    assert sees_only_the_past(model) and not is_bidirectional(model)
    assert enable_bidirectional(model) is model
    assert sees_all(model) and is_bidirectional(model)
    assert disable_bidirectional(model) is model
    assert sees_only_the_past(model) and not is_bidirectional(model)


def test_every_layer_is_bidirectional(make_model):
    """Each attention is asked alone: its input moves at the last position, its output everywhere."""
    model = enable_bidirectional(make_model(num_hidden_layers=3))
    outputs = []

    def move_last(_, args, kwargs):
        x = kwargs.pop("hidden_states", args[0] if args else None).clone()
        x[:, -1] += 1.0
        return (x, *args[1:]), kwargs

    for layer in model.model.layers:
        watch = layer.self_attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with torch.no_grad():
            model(IDS[:1])
            move = layer.self_attn.register_forward_pre_hook(move_last, with_kwargs=True)
            model(IDS[:1])
        watch.remove(), move.remove()
        assert ((outputs[-1] - outputs[-2]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", [torch.long, torch.int32, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_any_dtype_changes_nothing(make_model, side, kind):
    model = enable_bidirectional(make_model())
    ids, mask = (IDS, MASK) if side == "right" else (IDS.flip(1), MASK.flip(1))
    with torch.no_grad():
        padded = hidden(model, ids, mask.to(kind))
        alone = hidden(model, ids[1:, mask[1].bool()])
        junk = torch.where(mask.bool(), ids, 45)
        with_junk = hidden(model, junk, mask.to(kind))
    torch.testing.assert_close(padded[1, mask[1].bool()], alone[0], **CLOSE)
    torch.testing.assert_close(with_junk[mask.bool()], padded[mask.bool()], **CLOSE)
    with bidirectional(model, enabled=False), torch.no_grad():
        assert not torch.allclose(hidden(model, ids, mask.to(kind))[mask.bool()], padded[mask.bool()])
    assert padded.isfinite().all() and with_junk.isfinite().all()


def test_no_mask_and_a_mask_of_ones_are_the_same(make_model):
    model = enable_bidirectional(make_model())
    with torch.no_grad():
        torch.testing.assert_close(hidden(model), hidden(model, attention_mask=torch.ones_like(IDS)), **CLOSE)
    assert sees_all(model)


def test_a_row_of_padding_alone_is_finite_and_harmless(make_model):
    model = enable_bidirectional(make_model())
    mask = torch.tensor([[1] * 8, [0] * 8])
    with torch.no_grad():
        out = hidden(model, IDS, mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1], hidden(model, IDS[:1]), **CLOSE)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_are_strangers(make_model, rows):
    """Outputs and gradients of packed rows are those of each document alone."""
    model = enable_bidirectional(make_model())
    lengths = [(3, 1, 4), (2, 6, 0)][:rows]
    ids = IDS[:1].expand(rows, -1).clone()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = hidden(model, ids, position_ids=positions)
    alone = [[hidden(model, doc[None])[0] for doc in row.split([n for n in ns if n])]
             for row, ns in zip(ids, lengths, strict=True)]  # fmt: skip
    alone = torch.stack([torch.cat(row) for row in alone])
    torch.testing.assert_close(packed, alone, **CLOSE)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    parameters = list(model.model.parameters())
    for a, b in zip(torch.autograd.grad((packed * weight).sum(), parameters),
                    torch.autograd.grad((alone * weight).sum(), parameters), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_packed_documents_with_padding_at_the_end(make_model):
    model = enable_bidirectional(make_model())
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 0, 0]])
    with torch.no_grad():
        out = hidden(model, IDS, MASK, position_ids=positions)
        docs = [IDS[0, :3], IDS[0, 3:], IDS[1, :2], IDS[1, 2:5]]
        alone = torch.cat([hidden(model, doc[None])[0] for doc in docs])
    torch.testing.assert_close(out[MASK.bool()], alone, **CLOSE)
    assert out.isfinite().all()


@pytest.mark.parametrize("filler", [0, 1])
def test_the_positions_that_generate_gives_left_padding_are_one_document(make_model, filler):
    model = enable_bidirectional(make_model())
    ids, mask = IDS.flip(1), MASK.flip(1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    with torch.no_grad():
        out = hidden(model, ids, mask, position_ids=positions)
        torch.testing.assert_close(out[1, 3:], hidden(model, ids[1:, 3:])[0], **CLOSE)
    assert sees_all(model)


def test_positions_that_start_late_are_one_document(make_model):
    model = enable_bidirectional(make_model())
    assert reached(model, position_ids=torch.arange(20, 28)[None]).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [2, 3, 8, 50])
def test_a_window_reaches_as_far_ahead_as_back(make_model, backend, window):
    model = enable_bidirectional(make_model("mistral", backend, sliding_window=window, num_hidden_layers=1))
    distance = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    assert torch.equal(reached(model), distance < window)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_qwen2_without_use_sliding_window_has_no_window(make_model, backend):
    settings = dict(use_sliding_window=False, sliding_window=3, max_window_layers=0, num_hidden_layers=1)
    assert sees_all(enable_bidirectional(make_model("qwen2", backend, **settings)))


# --- what the model's forward still gives ---


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


# --- training ---


def gradients(model, attention_mask=MASK, after=None):
    """The gradient of each parameter of the stock loss; `after` runs between forward and backward."""
    model.zero_grad()
    labels = IDS.masked_fill(IDS == 0, -100)
    loss = model(IDS, attention_mask=attention_mask, labels=labels, use_cache=False).loss
    if after:
        after()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, backend, reentrant, padded):
    model = enable_bidirectional(make_model(backend=backend).train())
    mask = MASK if padded else None
    expected = gradients(model, mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_gradients(gradients(model, mask), expected)
    with bidirectional(model, enabled=False):
        causal = gradients(model, mask)
    assert not torch.allclose(causal["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpoints_recomputed_after_the_block_are_right_or_refused(make_model, reentrant):
    """The backward of a checkpointed forward runs the layers again, maybe in another mode: never silently causal."""
    model = make_model().train()
    causal = gradients(model, None)
    with bidirectional(model):
        expected = gradients(model, None)
    assert not torch.allclose(causal["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    enable_bidirectional(model)
    try:
        actual = gradients(model, None, after=functools.partial(disable_bidirectional, model))
    except (BidirectPatchError, torch.utils.checkpoint.CheckpointError):
        return
    assert_gradients(actual, expected)


def test_a_training_step_moves_the_weights(make_model):
    model = enable_bidirectional(make_model().train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sees_all(model.eval())


# --- the exact way back ---


@each_family
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
def test_disabled_it_is_the_model_that_it_was(make_model, family, backend):
    model = make_model(family, backend)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        logits = model(IDS, attention_mask=MASK, use_cache=False).logits
        before = snapshot(model)
        enable_bidirectional(model)
        bidirectional_logits = model(IDS, attention_mask=MASK).logits
        disable_bidirectional(model)
        assert_same(before, snapshot(model))
        assert torch.equal(model(IDS, attention_mask=MASK, use_cache=False).logits, logits)
    assert not torch.allclose(bidirectional_logits[:, 0], logits[:, 0])


def test_an_exception_inside_the_block_changes_nothing(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"):
        with bidirectional(model) as same:
            assert same is model and sees_all(model)
            raise KeyError("mine")
    assert_same(before, snapshot(model))
    # not with output_hidden_states: transformers 4.57 to 5.1 leave a wrapper of their own when such a forward raises
    with pytest.raises(BidirectPatchError), bidirectional(model):
        model(IDS, attention_mask=torch.ones(2, 3, 4))
    with pytest.raises(IndexError), bidirectional(model):
        model(IDS + 1000)
    assert_same(before, snapshot(model))
    assert sees_only_the_past(model)


def test_twice_is_once(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    disable_bidirectional(model)
    assert_same(before, snapshot(model))
    enable_bidirectional(enable_bidirectional(model))
    assert sees_all(model)
    disable_bidirectional(model)
    assert_same(before, snapshot(model))
    disable_bidirectional(model)
    assert_same(before, snapshot(model))


def test_blocks_nest_and_restore_what_they_found(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    with bidirectional(model):
        assert sees_all(model)
        with bidirectional(model, enabled=False):
            assert sees_only_the_past(model)
            attentions = {name: found for name, found in before[0].items() if name.endswith("self_attn")}
            assert_same((attentions, *before[1:]), ({name: snapshot(model)[0][name] for name in attentions}, *before[1:]))
            with bidirectional(model):
                assert sees_all(model)
            assert sees_only_the_past(model)
        assert sees_all(model)
        with bidirectional(model):
            assert sees_all(model)
        assert sees_all(model)
    assert_same(before, snapshot(model))
    enable_bidirectional(model)
    with bidirectional(model):
        pass
    assert sees_all(model)
    with pytest.raises(KeyError), bidirectional(model, enabled=False):
        assert sees_only_the_past(model)
        raise KeyError
    assert sees_all(model)


def test_toggled_inside_a_block_the_block_still_restores(make_model):
    model = make_model()
    with bidirectional(model):
        disable_bidirectional(model)
        assert sees_only_the_past(model)
    assert sees_only_the_past(model)
    with bidirectional(model, enabled=False):
        enable_bidirectional(model)
        assert sees_all(model)
    assert sees_only_the_past(model)


def test_isinstance_and_names_hold(make_model):
    model = make_model()
    enable_bidirectional(model)
    assert isinstance(model, transformers.LlamaForCausalLM) and isinstance(model.model, transformers.LlamaModel)
    assert sees_all(model)
    assert type(model.model).__name__ == "LlamaModel"
    assert type(model.model).__module__ == transformers.LlamaModel.__module__
    assert model.config.architectures in (None, ["LlamaForCausalLM"])
    assert list(model.state_dict()) == list(make_model().state_dict())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_config_is_never_touched(make_model, backend):
    """Not before, not during a forward, not after; and no is_causal is left in it."""
    model = make_model(backend=backend)
    hidden(model)
    found = copy.deepcopy(vars(model.config))
    during = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: during.append(copy.deepcopy(vars(model.config)))
    )
    enable_bidirectional(model)
    assert vars(model.config) == found
    hidden(model, IDS, MASK)
    hidden(model)
    disable_bidirectional(model)
    assert len(during) == 2
    for config in [*during, vars(model.config)]:
        config = dict(config)
        for key in ("_output_attentions", "output_hidden_states"):  # the forward's own kwargs, in some versions
            config.pop(key, None), found.pop(key, None)
        assert config == found


def test_models_of_one_config_object_stay_apart(make_model):
    config = tiny_config("llama")
    config._attn_implementation = "eager"
    one, two = transformers.LlamaForCausalLM(config).eval(), transformers.LlamaForCausalLM(config).eval()
    three = transformers.LlamaModel(one.config).eval()
    enable_bidirectional(one)
    assert is_bidirectional(one) and not is_bidirectional(two) and not is_bidirectional(three)
    other = IDS.clone()
    other[:, -1] = 60
    with torch.no_grad():
        for model, expected in ((one, True), (two, False), (three, False)):
            moved = not torch.equal(hidden(model, IDS)[:, 0], hidden(model, other)[:, 0])
            assert moved == expected


def test_a_class_swapped_on_top_is_not_dropped(make_model):
    model = enable_bidirectional(make_model())
    attention = model.model.layers[1].self_attn
    ours = type(attention)
    attention.__class__ = type("SomebodyElses", (ours,), {})
    before = snapshot(model)
    with pytest.raises(ForeignWrapperError, match="SomebodyElses"):
        disable_bidirectional(model)
    assert_same(before, snapshot(model))
    attention.__class__ = ours
    disable_bidirectional(model)
    assert sees_only_the_past(model)


# --- caches and generate ---


@each_family
def test_no_cache_is_built_and_none_is_taken(make_model, family):
    model = make_model(family)
    model.config.use_cache = True
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        assert cache is not None
        enable_bidirectional(model)
        for kwargs in ({}, {"use_cache": True}):
            assert getattr(model(IDS, **kwargs), "past_key_values", None) is None
            assert getattr(model.model(IDS, **kwargs), "past_key_values", None) is None
        for given in (cache, transformers.DynamicCache()):
            with pytest.raises(CacheError, match="past_key_values|cache"):
                model(IDS, past_key_values=given)
            with pytest.raises(CacheError):
                model.model(IDS, None, None, given)
        assert model.config.use_cache is True
        disable_bidirectional(model)
        assert model(IDS, use_cache=True).past_key_values is not None


@each_family
def test_generate_is_refused_and_fine_in_an_island(make_model, family):
    model = make_model(family)
    generate = functools.partial(model.generate, IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    stock = generate()
    enable_bidirectional(model)
    with pytest.raises(GenerateError, match=r"with bidirectional\(model, enabled=False\)"):
        model.generate(IDS[:1], max_new_tokens=6)
    with pytest.raises(GenerateError):  # a method that was taken before the patch, too
        generate()
    with bidirectional(model, enabled=False):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0), stock)
    assert sees_all(model)
    disable_bidirectional(model)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0), stock)


def test_another_model_may_generate_meanwhile(make_model):
    model, other = make_model(), make_model()
    stock = other.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    with bidirectional(model):
        assert torch.equal(other.generate(IDS[:1], max_new_tokens=3, do_sample=False), stock)


# --- bad input ---


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


# --- copies, files, wrappers ---


def test_a_deep_copy_is_a_model_of_its_own(make_model):
    model = enable_bidirectional(make_model())
    clone = copy.deepcopy(model)
    assert is_bidirectional(clone) and sees_all(clone)
    assert torch.equal(hidden(clone), hidden(model))
    disable_bidirectional(clone)
    assert sees_only_the_past(clone) and sees_all(model)
    assert {n: type(m) for n, m in clone.named_modules()} == {n: type(m) for n, m in make_model().named_modules()}
    with torch.no_grad():
        before = hidden(model).clone()
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(hidden(model), before)
    enable_bidirectional(clone)
    disable_bidirectional(model)
    assert is_bidirectional(clone) and sees_only_the_past(model)


def test_torch_save_of_the_whole_model(make_model):
    model = enable_bidirectional(make_model())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_bidirectional(loaded) and sees_all(loaded)
    assert torch.equal(hidden(loaded), hidden(model))
    disable_bidirectional(loaded)
    disable_bidirectional(model)
    assert sees_only_the_past(loaded)
    assert torch.equal(hidden(loaded), hidden(model))
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}


def test_a_saved_model_opens_in_another_process(make_model, tmp_path):
    model = enable_bidirectional(make_model())
    torch.save((model, model(IDS).logits.detach()), tmp_path / "model.pt")
    code = f"""
import torch
model, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from bidirect_patch import disable_bidirectional, is_bidirectional
assert is_bidirectional(model)
ids = torch.tensor({IDS.tolist()})
assert torch.allclose(model(ids).logits, expected, atol=1e-5)
disable_bidirectional(model)
assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
"""
    home = str(Path(bidirect_patch.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Encoder(nn.Module):
    """A user's own module: a decoder, mean pooling and a linear layer."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.out = nn.Linear(32, 4)

    def forward(self, input_ids, attention_mask=None):
        states = self.backbone(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.out(states)


def test_a_users_own_module(make_model):
    encoder = Encoder(make_model(head=False)).eval()
    other = IDS.clone()
    other[:, -1] = 60
    assert enable_bidirectional(encoder) is encoder and is_bidirectional(encoder)
    assert is_bidirectional(encoder.backbone)
    with torch.no_grad():
        assert not torch.equal(encoder(IDS)[:, 0], encoder(other)[:, 0])
        with bidirectional(encoder, enabled=False) as same:
            assert same is encoder
            assert torch.equal(encoder(IDS)[:, 0], encoder(other)[:, 0])
    disable_bidirectional(encoder.backbone)
    assert not is_bidirectional(encoder)
    assert type(encoder) is Encoder and type(encoder.backbone) is transformers.LlamaModel


def test_a_module_with_two_decoders(make_model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.document = make_model(head=False), make_model("qwen2", head=False)

    two = Two()
    enable_bidirectional(two)
    assert sees_all(two.query) and sees_all(two.document) and is_bidirectional(two)
    disable_bidirectional(two.query)
    assert not is_bidirectional(two)
    disable_bidirectional(two)
    assert sees_only_the_past(two.query) and sees_only_the_past(two.document)


def test_a_sequence_classifier():
    config = tiny_config("llama", num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    enable_bidirectional(model)
    assert sees_all(model)
    disable_bidirectional(model)
    assert sees_only_the_past(model)


def lora(model, head):
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    task = dict(task_type="CAUSAL_LM") if head else {}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **task)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("head", [True, False], ids=["causal-lm", "bare"])
@pytest.mark.parametrize("order", ["adapter-first", "patch-first"])
def test_peft_before_or_after(make_model, head, order):
    plain = make_model(head=head)
    names = {n: type(m) for n, m in lora(make_model(head=head), head).named_modules()}
    if order == "patch-first":
        model = lora(enable_bidirectional(plain), head)
        assert is_bidirectional(model)
    else:
        model = lora(plain, head)
        assert enable_bidirectional(model) is model
    assert sees_all(model)
    with torch.no_grad():
        merged = lora(make_model(head=head), head).merge_and_unload()
        expected = hidden(enable_bidirectional(merged), IDS, MASK)
        torch.testing.assert_close(hidden(model, IDS, MASK), expected, atol=1e-4, rtol=1e-4)

    model.train()
    hidden(model, IDS, MASK).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    model.eval()
    if head:
        with pytest.raises(GenerateError):
            model.generate(input_ids=IDS[:1], max_new_tokens=2)
        with bidirectional(model, enabled=False):
            model.generate(input_ids=IDS[:1], max_new_tokens=2)
    disable_bidirectional(model)
    assert sees_only_the_past(model)
    assert {n: type(m) for n, m in model.named_modules()} == names


@pytest.fixture
def one_process_group():
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["wrapped-first", "patched-first"])
def test_distributed_data_parallel(make_model, one_process_group, order):
    model = make_model()
    if order == "patched-first":
        enable_bidirectional(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert enable_bidirectional(wrapped) is wrapped
    assert is_bidirectional(wrapped) and sees_all(wrapped)
    loss = wrapped(IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable_bidirectional(alone := make_model())
    alone(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    assert_gradients(actual, {name: p.grad for name, p in alone.named_parameters()})
    disable_bidirectional(wrapped)
    assert sees_only_the_past(wrapped) and not is_bidirectional(model)


# --- torch.compile ---


@pytest.fixture
def fullgraph():
    """`fullgraph(model, **inputs)`: the model compiled as one graph, and its counter; a skip where stock can't be."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()

    def compiled(model, **inputs):
        try:
            torch.compile(model, fullgraph=True, backend="eager")(**inputs)
        except Exception as error:  # whatever Dynamo raises
            pytest.skip(
                f"stock {type(model).__name__} of transformers {TRANSFORMERS} isn't one graph: {str(error)[:80]!r}"
            )
        torch._dynamo.reset()
        counter = CompileCounter()
        return torch.compile(model, fullgraph=True, backend=counter), counter

    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_one_graph_a_mode_when_compiled(make_model, fullgraph, backend, padded):
    model = make_model(backend=backend, head=False)
    inputs = dict(input_ids=IDS, attention_mask=MASK) if padded else dict(input_ids=IDS)
    inputs["use_cache"] = False
    real = MASK.bool() if padded else torch.ones_like(MASK).bool()
    with torch.no_grad():
        compiled, counter = fullgraph(model, **inputs)
        causal = model(**inputs).last_hidden_state
        with bidirectional(model):
            full = model(**inputs).last_hidden_state
        assert not torch.allclose(causal[:, 0], full[:, 0])
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], causal[real], **CLOSE)
            with bidirectional(model):
                torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], full[real], **CLOSE)
    assert counter.frame_count <= 2


def test_the_compiled_wrapper_is_taken_like_the_model(make_model, fullgraph):
    model = make_model(head=False)
    with torch.no_grad():
        compiled, _ = fullgraph(model, input_ids=IDS, use_cache=False)
        assert enable_bidirectional(compiled) is compiled
        assert is_bidirectional(compiled) and is_bidirectional(model)
        full = compiled(input_ids=IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(full, hidden_states(model, IDS, torch.ones(2, 8, 8, dtype=torch.bool)), **CLOSE)
        disable_bidirectional(compiled)
        assert not is_bidirectional(model)
        causal = hidden_states(model, IDS, reach(torch.ones_like(IDS).bool(), causal=True))
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).last_hidden_state, causal, **CLOSE)


# --- threads ---


class Thread(threading.Thread):
    """Holds `with bidirectional(model, enabled)` open until told to leave."""

    def __init__(self, model, enabled):
        super().__init__(daemon=True)
        self.entered, self.leave, self.error = threading.Event(), threading.Event(), None

        def run():
            try:
                with bidirectional(model, enabled=enabled):
                    self.entered.set()
                    self.leave.wait(20)
            except BaseException as error:
                self.error = error
                self.entered.set()

        self.run = run

    def __enter__(self):
        self.start()
        assert self.entered.wait(20) and self.error is None
        return self

    def __exit__(self, *_):
        self.leave.set()
        self.join(20)
        assert not self.is_alive() and self.error is None


@pytest.mark.parametrize("theirs", [True, False], ids=["theirs-on", "theirs-off"])
def test_threads_that_want_opposite_modes_get_an_error(make_model, theirs):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    as_theirs = sees_all if theirs else sees_only_the_past
    with Thread(model, theirs):
        assert as_theirs(model)
        with pytest.raises(ModeConflictError) as caught:
            with bidirectional(model, enabled=not theirs):
                pytest.fail("entered")
        assert isinstance(caught.value, BidirectPatchError)
        with pytest.raises(ModeConflictError):
            (disable_bidirectional if theirs else enable_bidirectional)(model)
        assert as_theirs(model), "the first thread's mode holds"
        with bidirectional(model, enabled=theirs):
            assert as_theirs(model)
        assert as_theirs(model), "leaving must not take the mode from under the first thread"
    assert_same(before, snapshot(model))
    with bidirectional(model, enabled=not theirs):
        assert sees_all(model) != theirs
    assert_same(before, snapshot(model))


def test_the_last_thread_to_leave_restores(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    first = Thread(model, True)
    with first:
        second = Thread(model, True)
        second.__enter__()
    assert sees_all(model), "the second thread is still inside"
    second.__exit__()
    assert_same(before, snapshot(model))


def test_threads_in_the_same_mode_get_right_results(make_model):
    model = make_model()
    rows = torch.randint(3, 61, (4, 3, 8), generator=torch.Generator().manual_seed(5))
    mask = MASK[1:].expand(3, -1)
    with (
        torch.no_grad(),
        bidirectional(model),
    ):  # logits: transformers 4.57 to 5.1 record hidden states in no thread-safe way
        expected = [model(ids, attention_mask=mask).logits for ids in rows]
    assert not torch.allclose(model(rows[0], attention_mask=mask).logits[:, 0], expected[0][:, 0])
    before = snapshot(model)
    errors = []
    start = threading.Barrier(len(rows))

    def encode(ids, right):
        try:
            start.wait(20)
            with torch.no_grad():
                for _ in range(10):
                    with bidirectional(model):
                        out = model(ids, attention_mask=mask).logits
                    torch.testing.assert_close(out, right, **CLOSE)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=encode, args=pair, daemon=True) for pair in zip(rows, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("where", ["config", "call"])
def test_a_causal_flag_from_elsewhere_changes_nothing(make_model, where):
    """From 5.2 on transformers puts an is_causal of the config or the call above the module's own."""
    model = enable_bidirectional(make_model("llama", "sdpa", **({"is_causal": True} if where == "config" else {})))
    base = model.model if hasattr(model, "model") else model
    takes_any = "kwargs" in str(inspect.signature(base.forward))
    call = {"is_causal": True} if where == "call" and takes_any else {}
    other = IDS.clone()
    other[:, -1] += 1
    assert not torch.equal(base(IDS, **call)[0][:, 0], base(other, **call)[0][:, 0])


# --- what came up in reviews ---


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_skip_are_one_document(make_model, backend, masked):
    """Only a real token whose position isn't beyond the one before it starts a document."""
    model = enable_bidirectional(make_model(backend=backend))
    ids = IDS[:1]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    seen = ids.shape[1] * [None]
    for at in range(ids.shape[1]):
        other = ids.clone()
        other[0, at] = 60
        positions = torch.arange(0, 2 * ids.shape[1], 2)[None]
        with torch.no_grad():
            moved = hidden(model, ids, position_ids=positions, **mask) - hidden(model, other, position_ids=positions, **mask)
        seen[at] = moved.abs().amax(-1)[0] > 1e-6
    assert torch.stack(seen).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
def test_the_usual_positions_around_padding_are_one_document(make_model, backend):
    model = enable_bidirectional(make_model(backend=backend))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        out = hidden(model, IDS, mask, position_ids=positions)
        for row, real in enumerate(mask.bool()):
            torch.testing.assert_close(out[row, real], hidden(model, IDS[row : row + 1, real])[0], **CLOSE)


def test_a_window_and_padding_in_the_middle_are_refused_on_flash(make_model):
    model = enable_bidirectional(make_model("mistral", "flash_attention_2", sliding_window=3))
    mask = torch.ones_like(IDS)
    mask[:, 3:5] = 0
    with pytest.raises(AttentionMaskError, match="middle of a row"):
        hidden(model, attention_mask=mask)


def test_flash_put_in_after_enabling_keeps_the_window_or_says_so(make_model):
    reference = enable_bidirectional(make_model("mistral", "eager", sliding_window=3))
    model = make_model("mistral", "flash_attention_2", sliding_window=3)
    if type(model.model.layers[0].self_attn).__name__ != "MistralAttention":
        pytest.skip("this transformers has a class for each backend")
    model.config._attn_implementation = "eager"
    enable_bidirectional(model)
    model.config._attn_implementation = "flash_attention_2"
    try:
        out = hidden(model)
    except bidirect_patch.errors.OrderError as error:
        assert "changed to FlashAttention" in str(error)
    else:
        torch.testing.assert_close(out, hidden(reference), **CLOSE)


def test_qwen2_has_its_window_above_max_window_layers_on_each_backend(make_model):
    """The first layers see everything. Where a release can't take one mask for each kind of layer, it is refused."""
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_hidden_layers": 3}
    seen = {}
    for backend in ("eager", "sdpa", "flash_attention_2"):
        try:
            model = enable_bidirectional(make_model("qwen2", backend, **windows))
        except UnsupportedModelError as error:
            assert TRANSFORMERS < Version("4.42") and "not 2" in str(error)
            continue
        seen[backend] = hidden(model)
        allowed = [reach(MASK | 1, None, window) for window in (None, 3, 3)]
        torch.testing.assert_close(seen[backend], hidden_states(model, IDS, allowed), **CLOSE)
    assert seen


def test_what_replaced_forward_since_is_not_left_without_its_ground(make_model):
    model = enable_bidirectional(make_model(head=False))
    found = model.forward
    model.forward = lambda *args, **kwargs: found(*args, **kwargs)
    assert sees_all(model) and not is_bidirectional(model), "what it calls can't be known"
    with pytest.raises(OrderError, match="forward was replaced"):
        enable_bidirectional(model)
    assert sees_only_the_past(disable_bidirectional(model))
    del model.forward
    assert sees_only_the_past(model)


def test_attention_of_torch_in_a_pooler_is_none_of_the_decoders(make_model):
    class Pooled(transformers.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            self.pooler = nn.MultiheadAttention(config.hidden_size, 2, batch_first=True)

    model = enable_bidirectional(Pooled(make_model().config).eval())
    assert type(model.pooler) is nn.MultiheadAttention and is_bidirectional(model)


def test_another_default_device_around(make_model):
    class Own(transformers.LlamaModel):  # a class that nobody has proven
        pass

    model = Own(make_model().config).eval()
    with torch.device("meta"):
        enable_bidirectional(model)
    assert is_bidirectional(model)


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
