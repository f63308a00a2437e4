"""Models inside other modules: own modules, classifiers, PEFT, DDP."""

import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import GenerateError

from ..helpers.gradients import assert_gradients
from ..helpers.seeing import IDS, MASK, hidden, sees_all, sees_only_the_past
from ..helpers.tiny_models import tiny_config


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
@pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # a loss is a loss
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


def test_attention_of_torch_in_a_pooler_is_none_of_the_decoders(make_model):
    class Pooled(transformers.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            self.pooler = nn.MultiheadAttention(config.hidden_size, 2, batch_first=True)

    model = enable_bidirectional(Pooled(make_model().config).eval())
    assert type(model.pooler) is nn.MultiheadAttention and is_bidirectional(model)


@pytest.mark.parametrize("where", ["model", "attention"])
def test_a_plain_wrapper_that_was_put_on_after_the_patch(make_model, where, tmp_path):
    """It says nothing of what it calls, and is asked: one answer everywhere."""
    model = enable_bidirectional(make_model(head=False))
    wrapped = model if where == "model" else model.layers[0].self_attn
    inner = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert sees_all(model) and is_bidirectional(model)
    with bidirectional(model, enabled=False):
        assert sees_only_the_past(model)
    assert sees_all(model) and sees_all(enable_bidirectional(model))
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).is_causal is False
    assert sees_only_the_past(disable_bidirectional(model)) and sees_all(enable_bidirectional(model))
