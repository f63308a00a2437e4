"""A class that can't be made bidirectional is refused before anything is changed; what can't run yet, at its first forward."""

import copy
import threading
import time

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import LlamaModel

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.verify import late

from ..helpers import flash_double as double
from ..helpers.seeing import IDS, MASK, hidden, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import tiny_config
from ..helpers.versions import TRANSFORMERS

THREE = TRANSFORMERS < Version("4.48")  # what a layer expects of its attention: output, weights and the cache


class StubbornAttention(nn.Module):
    """Attention of a transformers to come: it heeds neither the mask nor the flag, and looks back alone."""

    def __init__(self, width):
        super().__init__()
        self.is_causal = True
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        seen = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return self.mix(hidden_states.cumsum(1) / seen), None, *([kwargs.get("past_key_value")] if THREE else [])


class StubbornModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn = StubbornAttention(config.hidden_size)


class ObedientModel(LlamaModel):
    """A class of its own, which nothing before this module has proven."""


def bare(cls):
    """A tiny random model of a class, its weights wide enough to tell tokens apart."""
    torch.manual_seed(0)
    model = cls._from_config(tiny_config("llama"), attn_implementation="sdpa")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model.eval()


def enabled_on_meta(cls):
    """A model of a class that was made bidirectional before it had weights."""
    with torch.device("meta"):
        model = bare(cls)
    return enable_bidirectional(model)


def materialized(model, like):
    """`model`, which was on meta, with the weights and buffers of `like`."""
    model.to_empty(device="cpu").load_state_dict(like.state_dict())
    for name, buffer in like.named_buffers():  # rotary frequencies are not in the state
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.clone()
    if hasattr(model, "rotary_emb") and hasattr(model.rotary_emb, "original_inv_freq"):
        model.rotary_emb.original_inv_freq = model.rotary_emb.inv_freq
    return model


def test_the_stubborn_model_is_what_it_is_for():
    assert sees_only_the_past(bare(StubbornModel)) and sees_only_the_past(bare(ObedientModel))


def test_a_class_that_heeds_nothing_is_refused_and_left_as_it_was():
    model = bare(StubbornModel)
    out, before = hidden(model), snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"StubbornModel was not made bidirectional.*\(causal"):
        enable_bidirectional(model)
    assert_same(before, snapshot(model))
    assert torch.equal(hidden(model), out) and not is_bidirectional(model)


def test_attention_that_somebody_put_in_is_looked_at_itself():
    """The class LlamaModel is fine; this model of it has an attention module in it that isn't."""
    enable_bidirectional(bare(LlamaModel))
    model = bare(LlamaModel)
    model.layers[1].self_attn = StubbornAttention(model.config.hidden_size)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"the model itself: layers\.1 LlamaDecoderLayer \(causal"):
        enable_bidirectional(model)
    assert_same(before, snapshot(model))


def test_a_model_on_meta_is_proven_at_its_first_forward():
    like = bare(ObedientModel)
    model = enabled_on_meta(ObedientModel)
    assert all(p.is_meta for p in model.parameters())
    materialized(model, like)
    again = copy.deepcopy(model)
    assert sees_all(model) and sees_all(again)
    torch.testing.assert_close(hidden(model, attention_mask=MASK), hidden(enable_bidirectional(like), attention_mask=MASK))
    assert not [name for name in vars(disable_bidirectional(model)) if "bidirect" in name]


def test_a_stubborn_model_on_meta_gives_no_output():
    class Late(StubbornModel):  # a class that nobody has tried
        pass

    model = enabled_on_meta(Late)
    materialized(model, bare(Late))
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="Late was not made bidirectional"):
            hidden(model)
    assert sees_only_the_past(disable_bidirectional(model))


def test_no_thread_gets_an_output_while_another_verifies(monkeypatch):
    class Slow(StubbornModel):  # a class that nobody has tried
        pass

    model = enabled_on_meta(Slow)
    materialized(model, bare(Slow))
    begun, got = threading.Event(), []

    def slow(*args, verify=late.verify, **kwargs):
        begun.set()
        time.sleep(0.5)  # the other thread calls the model meanwhile
        return verify(*args, **kwargs)

    def call():
        try:
            got.append(hidden(model))
        except UnsupportedModelError:
            got.append("refused")

    monkeypatch.setattr(late, "verify", slow)
    first, second = threading.Thread(target=call), threading.Thread(target=call)
    first.start()
    assert begun.wait(60)
    second.start()
    first.join()
    second.join()
    assert got == ["refused", "refused"]


def test_what_was_not_verified_stays_that_through_a_causal_block():
    class Later(StubbornModel):  # a class that nobody has tried
        pass

    model = enabled_on_meta(Later)
    with bidirectional(model, enabled=False):
        pass
    materialized(model, bare(Later))
    with pytest.raises(UnsupportedModelError, match="Later was not made bidirectional"):
        hidden(model)


def broken(*_, **__):
    raise RuntimeError("no kernel on this device")


def always_causal(query, key, value, scale=None, causal=False, *how, **ends):
    return attend(query, key, value, scale, True, *how, **ends)


attend = double.attend


@pytest.mark.parametrize("later", [attend, always_causal], ids=["honest", "stubborn"])
def test_a_kernel_that_comes_later_is_seen_at_the_first_forward(flash_double, monkeypatch, later):
    """Enabled on a machine's CPU, then moved to where FlashAttention runs."""

    class Late(LlamaModel):  # a class that nobody has tried
        pass

    flash_double.install(2)
    monkeypatch.setattr(double, "attend", broken)
    torch.manual_seed(0)
    model = Late._from_config(tiny_config("llama"), attn_implementation="flash_attention_2").eval()
    enable_bidirectional(model)
    with pytest.raises(RuntimeError, match="no kernel"):
        hidden(model)
    monkeypatch.setattr(double, "attend", later)
    if later is attend:
        reference = Late._from_config(tiny_config("llama"), attn_implementation="eager").eval()
        reference.load_state_dict(model.state_dict())
        torch.testing.assert_close(hidden(model), hidden(enable_bidirectional(reference)), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
            hidden(model)


def test_what_cannot_be_seen_is_an_error_unless_it_is_taken_on_trust(monkeypatch):
    """A model that runs, but not on random tokens, and no small one of which can be made."""

    class Choosy(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            if config.vocab_size < 60:
                raise RuntimeError("too small")

        def forward(self, input_ids=None, **kwargs):
            if input_ids.shape[0] > 2:
                raise RuntimeError("at most two rows")
            return super().forward(input_ids, **kwargs)

    monkeypatch.setattr("bidirect_patch.model.tiny.VOCAB", 32)
    model = bare(Choosy)
    enable_bidirectional(model)
    with pytest.raises(UnsupportedModelError, match="Choosy runs, but.*allow_partial=True"):
        model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="at most two rows"):
        model(input_ids=IDS.repeat(2, 1))
    disable_bidirectional(model)
    enable_bidirectional(model, allow_partial=True)
    other = IDS.clone()
    other[0, -1] = 60
    assert not torch.equal(model(input_ids=IDS)[0][0, 0], model(input_ids=other)[0][0, 0])
