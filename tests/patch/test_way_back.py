"""The exact way back, and what is never touched; forwards and classes that other tools replaced."""

import copy

import pytest
import torch
import torch.utils.checkpoint
import transformers

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ForeignWrapperError, OrderError

from ..helpers.seeing import IDS, MASK, hidden, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import each_family, tiny_config


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


def test_what_replaced_forward_since_is_not_left_without_its_ground(make_model):
    model = enable_bidirectional(make_model(head=False))
    found = model.forward
    model.forward = lambda ids, *args, **kwargs: found(ids + 0, *args, **kwargs)
    assert sees_all(model) and not is_bidirectional(model), "what it calls can't be known, since it looks into its input first"
    with pytest.raises(OrderError, match="forward was replaced"):
        enable_bidirectional(model)
    for enabled in (True, False):
        with pytest.raises(OrderError, match="forward was replaced"), bidirectional(model, enabled=enabled):
            pass
        assert sees_all(model), "a block that is refused changes nothing"
    assert sees_only_the_past(disable_bidirectional(model))
    del model.forward
    assert sees_only_the_past(model)


def test_another_default_device_around(make_model):
    class Own(transformers.LlamaModel):  # a class that nobody has proven
        pass

    model = Own(make_model().config).eval()
    with torch.device("meta"):
        enable_bidirectional(model)
    assert is_bidirectional(model)
