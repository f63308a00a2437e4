"""The report on real models, against tokens changed by hand; and what it leaves behind."""

import copy
from unittest import mock

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from bidirect_patch import enable_bidirectional
from bidirect_patch.errors import ConfigError, StillCausalError, UnsupportedModelError
from bidirect_patch.model.tiny import tiny_like
from bidirect_patch.verify.report import assert_bidirectional, attention_report

from ..helpers.tiny_models import FAMILIES, tiny_model
from ..helpers.toy_layers import FULL, Layer, Toy
from ..helpers.versions import BACKENDS, TRANSFORMERS


@torch.no_grad()
def by_tokens(model, length):
    """[q, k]: the last hidden state at q moves when token k is another. Right for one layer only."""
    ids = torch.arange(5, 5 + length)
    rows = ids.repeat(length + 1, 1)
    for k in range(length):
        rows[k + 1, k] += 20
    states = model(input_ids=rows).last_hidden_state
    return ((states[1:] - states[:1]).abs().amax(-1) > 1e-6).T


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_changing_tokens_by_hand(family, enabled):
    settings = {"sliding_window": 4} if family == "mistral" else {}
    model = tiny_model(family, "eager", head=False, num_hidden_layers=1, **settings)
    if enabled:
        enable_bidirectional(model)
    report = attention_report(model, length=9)
    assert torch.equal(report.layers[0].matrix, by_tokens(model, 9))
    assert report.is_bidirectional is enabled


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backend_before_and_after(make_model, backend):
    model = make_model("llama", backend)
    before = attention_report(model)
    assert {layer.verdict for layer in before.layers} == {"causal"}
    enable_bidirectional(model)
    after = attention_report(model)
    assert after.is_bidirectional and after.unlike_mirror_of(before) == []
    assert [layer.name for layer in after.layers] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("heads", [(8, 2), (2, 1)])
def test_doge_whose_dynamic_mask_is_learned(heads):
    """Its mask keeps the best `keep_window_size` keys; and it makes some weights too small to move the output."""
    if not hasattr(transformers, "DogeConfig"):
        pytest.skip(f"transformers {TRANSFORMERS} has no Doge")
    width = dict(hidden_size=32, intermediate_size=128) if heads[0] == 2 else {}
    config = transformers.DogeConfig(num_attention_heads=heads[0], num_key_value_heads=heads[1], **width)
    seed_for_real = torch.manual_seed
    for seed in range(4):
        with mock.patch.object(torch, "manual_seed", lambda _, seed=seed: seed_for_real(seed)):
            model = tiny_like(config, "eager")
        assert {layer.verdict for layer in attention_report(model).layers} == {"causal"}
        assert attention_report(enable_bidirectional(model)).is_bidirectional


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = tiny_model("llama", "eager").to(dtype)
    assert {layer.verdict for layer in attention_report(model).layers} == {"causal"}
    assert attention_report(enable_bidirectional(model)).is_bidirectional


@pytest.mark.skipif(TRANSFORMERS < Version("5.2"), reason="transformers has is_causal=False in the config since 5.2")
def test_what_transformers_own_switch_leaves_undone():
    llama, mistral = tiny_model("llama"), tiny_model("mistral", sliding_window=4)
    causal = attention_report(mistral)
    llama.config.is_causal = mistral.config.is_causal = False
    assert {layer.packing_ok for layer in attention_report(llama).layers} == {False}
    assert len(attention_report(mistral).unlike_mirror_of(causal)) == 2  # its window reaches one too far


@pytest.mark.slow
def test_real_weights(load_real):
    model, _ = load_real()
    before = attention_report(model)
    assert {layer.verdict for layer in before.layers} == {"causal"}
    after = attention_report(enable_bidirectional(model))
    assert after.is_bidirectional and after.unlike_mirror_of(before) == []
    assert all(layer.matrix.all() for layer in after.layers)


class Holder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.pooler, self.encoder = nn.Linear(4, 4), encoder


def compiled(model):
    model = torch.compile(model, backend="eager")
    model(input_ids=torch.tensor([[5, 6, 7]]))
    return model


@pytest.mark.parametrize("wrap", [Holder, compiled, lambda m: m.model, lambda m: Holder(Holder(m.model))])
def test_wrappers(wrap):
    model = tiny_model("llama")
    wrapped = wrap(model)
    assert {layer.verdict for layer in attention_report(wrapped).layers} == {"causal"}
    enable_bidirectional(wrapped)
    assert attention_report(wrapped).is_bidirectional
    assert len(attention_report(wrapped).layers) == 2


def test_peft():
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert model.training
    assert {layer.verdict for layer in attention_report(model).layers} == {"causal"}
    assert model.training and all(p.grad is None for p in model.parameters())


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate", reason="accelerate isn't installed")
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert {layer.verdict for layer in attention_report(model).layers} == {"causal"}


def trace(model):
    modules = list(model.modules())
    return (
        [(m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(m.__dict__)) for m in modules],
        [(p.requires_grad, p.grad is None, p.detach().clone().tolist()) for p in model.parameters()],
        model.config.to_dict(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


def test_dropout_and_mixed_training_flags_are_left_alone():
    model = tiny_model("llama", "eager", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    before = trace(model)
    with torch.no_grad():
        report = attention_report(model)
    assert {layer.verdict for layer in report.layers} == {"causal"}
    assert trace(model) == before
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


class Failing(Layer):
    def forward(self, states, mask=None, documents=1):
        if mask is not None:
            raise RuntimeError("broken kernel")
        return super().forward(states, mask, documents)


def test_nothing_stays_after_an_error():
    model = Toy(Layer(FULL), Failing(FULL)).train()
    before = trace(model)
    with pytest.raises(UnsupportedModelError, match="Toy failed on random input_ids .*attention_mask.*broken kernel"):
        attention_report(model)
    assert trace(model) == before


def test_two_reports_of_one_model_are_equal():
    model = tiny_model("llama")
    first, second = attention_report(model), attention_report(copy.deepcopy(model))
    assert str(first) == str(second)


@pytest.mark.parametrize("sinks, sinkless", [(1, 0), (2, 1), (4, 2)])
def test_sinks_are_seen_in_the_report(sinks, sinkless):
    model = tiny_model("llama")
    causal = attention_report(model, length=11)
    enable_bidirectional(model, num_sink_tokens=sinks, num_sinkless_layers=sinkless)
    report = attention_report(model, length=11)
    assert report.is_bidirectional and report.unlike_mirror_of(causal) == []
    assert [layer.num_sink_tokens for layer in report.layers] == [sinks] * 2
    assert [layer.sees_sinks for layer in report.layers] == [i < 2 - sinkless for i in range(2)]
    lines = [line for line in str(report).splitlines() if f"{sinks} sink token" in line]
    assert len(lines) == 2 and sum("don't see" in line for line in lines) == sinkless
    shown = [repr(layer.self_attn) for layer in model.model.layers]
    assert all(f"{sinks} sink token" in text for text in shown) and sum("don't see" in text for text in shown) == sinkless
    assert attention_report(model).length == 7 + sinks
    with pytest.raises(ConfigError, match="sink tokens"):
        attention_report(model, length=sinks + 2)
    enable_bidirectional(model)
    assert [layer.num_sink_tokens for layer in attention_report(model).layers] == [0, 0]
    assert "sink" not in repr(model)


def given_another_mask(model, right, wrong):
    """`model`, whose attention modules are given the mask `wrong`, bool (query, key), where the patch gives them `right`."""

    def replace(module, args, kwargs):
        given = kwargs["attention_mask"]
        if given.shape[-2:] == right.shape and torch.equal(given[0, 0] == 0, right):
            hidden = torch.finfo(given.dtype).min
            kwargs = {**kwargs, "attention_mask": given.masked_fill(~wrong, hidden).masked_fill(wrong, 0)}
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "wrong", ["nothing", "a sink sees the text", "others don't see it", "too many", "too few", "too many asked"]
)
def test_other_sinks_than_those_asked_for_are_no_bidirectional_model(wrong):
    """The masks are changed below the patch, so that its flags say that all is well."""
    model = enable_bidirectional(tiny_model("llama", "eager"), num_sink_tokens=2)
    right = torch.ones(9, 9, dtype=torch.bool)
    right[:2] = right[:2].tril()
    seen = right.clone()
    if wrong == "a sink sees the text":
        seen[1, 5] = True
    elif wrong == "others don't see it":
        seen[2:, :2] = False
    elif wrong == "too many":
        seen[2, 3:] = False
    elif wrong == "too few":
        seen[1, 2:] = True
    elif wrong == "too many asked":
        enable_bidirectional(model, num_sink_tokens=3)
        right[2, 3:] = False
    given_another_mask(model, right, seen)
    if wrong == "nothing":
        return assert_bidirectional(model, length=9)
    with pytest.raises(StillCausalError):
        assert_bidirectional(model, length=9)


def test_a_sinkless_layer_that_sees_the_sinks_is_no_bidirectional_layer():
    model = enable_bidirectional(tiny_model("llama", "eager"), num_sink_tokens=2, num_sinkless_layers=2)
    right = torch.ones(9, 9, dtype=torch.bool)
    right[:2] = right[:2].tril()
    seen = right.clone()
    right[2:, :2] = False
    assert_bidirectional(model, length=9)
    with pytest.raises(StillCausalError):
        assert_bidirectional(given_another_mask(model, right, seen), length=9)


def test_sinks_that_nobody_asked_for_are_no_bidirectional_model():
    model = enable_bidirectional(tiny_model("llama", "eager"))
    right = torch.ones(9, 9, dtype=torch.bool)
    seen = right.clone()
    seen[:1] = seen[:1].tril()
    assert_bidirectional(model, length=9)
    with pytest.raises(StillCausalError):
        assert_bidirectional(given_another_mask(model, right, seen), length=9)


class Reward(transformers.LlamaForCausalLM):
    """Reads its own logits at the last token."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out["scores"] = out.logits[torch.arange(len(input_ids)), input_ids.shape[1] - 1]
        return out


def test_logits_that_somebody_reads_are_all_computed():
    model = tiny_model()
    rewarding = Reward(model.config).eval()
    for hooked, read in ((model, model.register_forward_hook(lambda m, a, out: out.logits[:, 6])), (rewarding, None)):
        assert attention_report(enable_bidirectional(hooked)).is_bidirectional
        if read:
            read.remove()


@pytest.mark.skipif(TRANSFORMERS < Version("4.45"), reason="the forward computes all logits until 4.45")
def test_logits_that_nobody_reads_are_not_computed():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    attention_report(model)
    assert set(seen) == {1}
