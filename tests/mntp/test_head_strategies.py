"""Which way the MNTP head computes a loss, and what each way gives beside it; the fused kernel by a stand-in."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers

from bidirect_patch import apply_mntp_head, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import HeadError, OrderError
from bidirect_patch.mntp import head as mntp_head
from bidirect_patch.mntp import loss as linear_loss
from bidirect_patch.mntp.head import remove_mntp_head

from ..helpers.heads import LOSS_KWARGS, VOCAB, batch, check_step, nothing_scored, pair, with_routers
from ..helpers.tiny_models import tiny_model


def hooked(model):
    model.lm_head.register_forward_hook(lambda *a: None)
    return model


def plain(model):
    return model


def with_own_loss(model):
    if getattr(getattr(transformers.PreTrainedModel, "loss_function", None), "fset", None) is None:
        pytest.skip("this transformers has no loss_function that can be set")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().pow(2).mean()
    return model


@pytest.mark.parametrize("make", [plain, hooked, with_own_loss])
@pytest.mark.parametrize("routers", [False, True])
def test_evaluation_gives_the_stock_loss_and_logits_each_way(make, routers):
    stock, ours = pair(with_routers().eval() if routers else tiny_model())
    stock, ours = make(stock), make(ours)
    with torch.no_grad():
        want, found = stock(**batch()), ours(**batch())
    scored = F.pad(batch()["labels"][:, 1:] != -100, (0, 1))
    torch.testing.assert_close(found.loss, want.loss)
    torch.testing.assert_close(found.logits[scored], want.logits[scored], rtol=1e-5, atol=1e-5)
    assert not found.logits[~scored].any() and not found.logits.requires_grad


@pytest.mark.parametrize("make", [plain, hooked])
@pytest.mark.parametrize("routers", [False, True])
def test_a_single_scored_token_is_its_own_mean(make, routers):
    inputs = batch()
    inputs["labels"][:] = -100
    inputs["labels"][1, 4] = 7
    stock, ours = pair(with_routers() if routers else tiny_model().train())
    check_step(make(stock), make(ours), **inputs)


@pytest.mark.skipif(not LOSS_KWARGS, reason="this transformers has no num_items_in_batch")
@pytest.mark.parametrize("make", [plain, hooked])
@pytest.mark.parametrize("items", [1, 3, torch.tensor(1), torch.tensor(3)], ids=str)
def test_the_number_of_items_divides_each_way(make, items):
    stock, ours = pair(tiny_model().train())
    check_step(make(stock), make(ours), **batch(), num_items_in_batch=items)
    stock, ours = pair(with_routers())
    check_step(make(stock), make(ours), **batch(), num_items_in_batch=items)


@pytest.mark.skipif(not LOSS_KWARGS, reason="this transformers has no num_items_in_batch")
def test_routers_count_where_only_this_part_of_a_step_has_nothing_scored():
    """The step has items, so the stock sum over nothing is 0, and the routers' loss is there."""
    stock, ours = pair(with_routers())
    want = stock(**nothing_scored(), num_items_in_batch=5).loss
    assert want > 0.1
    torch.testing.assert_close(ours(**nothing_scored(), num_items_in_batch=5).loss, want)


@pytest.mark.skipif(not LOSS_KWARGS, reason="this transformers has no shift_labels")
def test_labels_that_are_shifted_already_go_to_the_stock_loss():
    stock, ours = pair(tiny_model().train())
    shifted = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    check_step(stock, ours, **batch(), shift_labels=shifted)
    assert ours(**batch(), shift_labels=shifted).logits is not None


@pytest.mark.parametrize("wrong", [1, 0, "no", torch.tensor(True)], ids=repr)
def test_skip_logits_is_a_flag(wrong):
    with pytest.raises(HeadError, match="skip_logits must be True, False or None"):
        apply_mntp_head(tiny_model())(**batch(), skip_logits=wrong)


def test_skip_logits_comes_before_the_mode():
    model = apply_mntp_head(tiny_model())
    assert model(**batch(), skip_logits=True).logits is None and model(**batch(), skip_logits=None).logits is not None
    assert model.train()(**batch(), skip_logits=False).logits is not None


@pytest.mark.parametrize("of_config", [True, False])
def test_the_output_is_a_tuple_where_the_config_or_the_call_says_so(of_config):
    model = tiny_model().train()
    model.config = copy.deepcopy(model.config)  # the decoder keeps its own: with tuples inside, stock fails too
    model.config.return_dict = of_config
    if isinstance(model(**batch(), return_dict=True), tuple):
        pytest.skip("this transformers returns a tuple whatever the call says")
    apply_mntp_head(model)
    assert isinstance(model(**batch()), tuple) is not of_config
    assert isinstance(model(**batch(), return_dict=not of_config), tuple) is of_config


def test_a_loss_of_ones_own_may_give_labels_another_meaning():
    model = with_own_loss(apply_mntp_head(tiny_model().train()))
    inputs = batch()
    inputs["labels"][1, 3] = VOCAB + 5
    assert model(**inputs).loss > 0


class WithoutCall(transformers.LlamaForCausalLM):
    """Takes the weight of its head instead of calling it, as a family of transformers' own might."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        kwargs.pop("return_dict", None)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = hidden @ self.lm_head.weight.t()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    forward.__module__ = "transformers.models.made_up"


@pytest.mark.parametrize("make", [plain, hooked])
def test_a_forward_that_does_not_call_its_head_is_refused(make):
    model = make(apply_mntp_head(WithoutCall._from_config(tiny_model().config)))
    with pytest.raises(HeadError, match="makes its logits without calling its output head"):
        model(**batch())


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Marked(torch.nn.Parameter):
    """As a DTensor is no plain tensor."""


@pytest.mark.parametrize("kind", ["subclass", "weight"])
def test_a_head_that_is_no_plain_linear_layer_is_called(kind, monkeypatch):
    in_chunks, total = [], linear_loss.total
    monkeypatch.setattr(linear_loss, "total", lambda *given: in_chunks.append(1) or total(*given))
    stock, ours = pair(tiny_model().train())
    for model in (stock, ours):
        if kind == "subclass":
            model.lm_head.__class__ = Doubled
        else:
            model.lm_head.weight.__class__ = Marked
    check_step(stock, ours, **batch())
    assert not in_chunks
    check_step(*pair(tiny_model().train()), **batch())
    assert in_chunks


def test_errors_come_before_the_attention_is_changed(monkeypatch):
    monkeypatch.setattr(mntp_head, "enable_with_sinks_found", lambda model: pytest.fail("the attention was changed first"))
    model = tiny_model()
    found = model.forward
    model.forward = lambda *args, **kwargs: found(*args, **kwargs)
    with pytest.raises(OrderError):
        apply_mntp_head(model)
    assert not is_bidirectional(model)
    with pytest.raises(HeadError):
        remove_mntp_head("model")


# The fused kernel


@pytest.fixture
def fused(monkeypatch):
    """A stand-in for the fused kernel, on what counts as a GPU; the number of its calls."""
    calls = []

    def kernel(weight, hidden, targets, bias):
        calls.append(len(hidden))
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")

    monkeypatch.setattr(linear_loss, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(linear_loss, "_liger", lambda: kernel)
    return calls


def tensors(rows=4):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 8, generator=generator).requires_grad_() for size in (rows, VOCAB))
    return hidden, weight, torch.arange(rows)


class Sink:
    def add(self, part, logits, targets):
        pass


def test_the_fused_kernel_gives_the_same_loss_once(fused):
    hidden, weight, targets = tensors()
    loss = linear_loss.total(hidden, weight, None, targets, lambda x: x, None)
    want = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), torch.autograd.grad(want, (hidden, weight))):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    assert fused == [4]


@pytest.mark.parametrize("why", ["finish", "sink", "no rows", "frozen rows", "another dtype", "no gpu", "not installed"])
def test_where_the_fused_kernel_does_not_fit_it_is_not_taken(why, fused, monkeypatch):
    hidden, weight, targets = tensors(0 if why == "no rows" else 4)
    if why == "frozen rows":
        hidden = hidden.detach()
    if why == "another dtype":
        weight = weight.detach().double().requires_grad_()
        hidden = hidden.detach().requires_grad_()
    if why == "no gpu":
        monkeypatch.setattr(linear_loss, "_on_gpu", lambda tensor: False)
    if why == "not installed":
        monkeypatch.setattr(linear_loss, "_liger", lambda: None)
    finish = (lambda x: x * 2) if why == "finish" else (lambda x: x)
    loss = linear_loss.total(hidden, weight, None, targets, finish, Sink() if why == "sink" else None)
    want = F.cross_entropy(finish(hidden.to(weight.dtype) @ weight.t()).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    assert not fused


@pytest.mark.parametrize("version", ["new", "old", "none"])
def test_ligers_kernel_is_asked_to_sum_in_float32(version, monkeypatch):
    class Loss:
        def __init__(self, reduction, accum_dtype):
            self.settings = reduction, accum_dtype

    class Older:
        def __init__(self, reduction):
            pass

    module = types.ModuleType("liger_kernel.transformers")
    if version != "none":
        module.LigerFusedLinearCrossEntropyLoss = Loss if version == "new" else Older
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    found = linear_loss._liger.__wrapped__()
    assert found.settings == ("sum", torch.float32) if version == "new" else found is None


def test_a_chunk_holds_some_200_rows_of_a_large_vocabulary():
    """Fewer are slow, more take memory."""
    assert 200 <= linear_loss.CHUNK_BYTES // (4 * 128256) <= 256


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_each_gradient_is_taken_where_it_is_wanted_alone(frozen, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * VOCAB * 3)
    hidden, weight, targets = tensors(10)
    bias = torch.linspace(-1, 1, VOCAB).requires_grad_()
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    given[frozen] = given[frozen].detach()
    wanted = [tensor for name, tensor in given.items() if name != frozen]
    loss = linear_loss.total(*given.values(), targets, lambda x: x, None)
    want = F.cross_entropy(F.linear(*given.values()), targets, reduction="sum")
    assert [name for name, kept in zip(given, loss.grad_fn.saved_tensors) if kept is None] == [frozen]
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(want, wanted)):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_for_a_backward_that_nobody_wants():
    hidden, weight, targets = tensors()
    with torch.no_grad():
        assert not linear_loss.total(hidden, weight, None, targets, lambda x: x, None).requires_grad
    model = enable_bidirectional(tiny_model())
    assert not apply_mntp_head(model.requires_grad_(False))(**batch()).loss.requires_grad
