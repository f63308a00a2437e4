"""Loss and gradients of the MNTP head are those of the stock forward."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers

from bidirect_patch import apply_mntp_head, enable_bidirectional, is_bidirectional
from bidirect_patch.mntp.head import remove_mntp_head

from ..helpers.heads import LOSS_KWARGS, VOCAB, batch, check_step, nothing_scored, pair, with_routers
from ..helpers.tiny_models import FAMILIES, SIZES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_stock(family, chunks):
    stock, ours = pair(tiny_model(family).train())
    for seed in range(2):
        check_step(stock, ours, **batch(seed=seed))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    check_step(stock, ours, **batch(), attention_mask=mask)


@pytest.mark.skipif(not LOSS_KWARGS, reason="this transformers has no num_items_in_batch")
@pytest.mark.parametrize("items", [50, torch.tensor(50), 0.25, torch.tensor(0.25)], ids=str)
def test_num_items_in_batch(items, chunks):
    stock, ours = pair(tiny_model().train())
    loss = check_step(stock, ours, **batch(), num_items_in_batch=items)
    mean = ours(**batch()).loss
    scored = (batch()["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss * items, mean.detach() * scored)


@pytest.mark.parametrize("bias", [0.0, -60.0, -85.0, -95.0, -105.0, -1e4, -torch.inf])
def test_targets_that_are_next_to_impossible(bias):
    """Their probabilities are no float32, or have few digits. Logarithms of them in float64 are the reference."""
    from bidirect_patch.mntp.loss import total

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (6, 9))
    shift = torch.zeros(9)
    shift[2] = bias
    targets = torch.tensor([2, 0, 2, 5, 2, 2])
    hidden.requires_grad_()
    loss = total(hidden, weight, shift, targets, lambda logits: logits, None)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T + shift.double(), targets, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(*each)[0].double() for each in ((loss, hidden), (expected, exact))))


def scaled_models():
    """Families whose logits are more than the head's output, as far as this transformers has them."""
    for name, settings in {
        "Gemma2": dict(final_logit_softcapping=0.7, sliding_window=64),
        "Gemma3Text": dict(final_logit_softcapping=0.7, sliding_window=64),
        "Cohere": dict(logit_scale=0.3),
        "Granite": dict(logits_scaling=5.0),
    }.items():
        if hasattr(transformers, f"{name}Config"):
            yield pytest.param(name, settings, id=name)


@pytest.mark.parametrize("name, settings", list(scaled_models()))
def test_softcapping_and_scaling(name, settings, chunks):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    cls = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").train()
    stock, ours = pair(model)
    loss = check_step(stock, ours, **batch())
    for key, value in settings.items():
        if "window" not in key:  # it matters: without it the loss is another
            setattr(ours.config, key, value * 3)
    assert abs(ours(**batch()).loss - loss) > 1e-4 or name == "Cohere"  # which keeps its scale on the module
    assert name != "Cohere" or ours.logit_scale == settings["logit_scale"]


@pytest.mark.parametrize("output_router_logits", [True, False])
def test_a_router_loss_is_added_as_in_stock(output_router_logits):
    stock, ours = pair(with_routers(output_router_logits))
    loss = check_step(stock, ours, **batch())
    ours.config.output_router_logits = False
    assert (ours(**batch()).loss - loss).abs() > 0.1 if output_router_logits else True


def test_bias_frozen_and_untied_heads(chunks):
    model = tiny_model().train()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))
    stock, ours = pair(model)
    check_step(stock, ours, **batch())
    for m in (stock, ours):
        m.lm_head.requires_grad_(False)
        m.get_input_embeddings().requires_grad_(False)
    check_step(stock, ours, **batch())
    assert ours.lm_head.weight.grad is None


def test_a_hook_on_the_head_still_runs():
    stock, ours = pair(tiny_model().train())
    rows = []
    for m in (stock, ours):
        m.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]) or output * 2)
    check_step(stock, ours, **batch(share=0.2))
    scored = int((batch(share=0.2)["labels"][:, 1:] != -100).sum())
    assert rows == [17, scored]


@pytest.mark.skipif(
    getattr(getattr(transformers.PreTrainedModel, "loss_function", None), "fset", None) is None,
    reason="loss_function can't be set in this transformers",
)
def test_a_custom_loss_function_is_used():
    def loss_function(logits, labels, vocab_size, **kwargs):
        picked = logits[:, :-1].float().log_softmax(-1).exp()
        targets = labels[:, 1:]
        scored = targets != -100
        return (1 - picked.gather(-1, targets.clamp(min=0)[..., None])[..., 0])[scored].pow(2).mean()

    model = tiny_model().train()
    model.loss_function = loss_function
    stock, ours = pair(model)
    stock.loss_function = loss_function
    check_step(stock, ours, **batch())


@pytest.mark.skipif(
    getattr(getattr(transformers.PreTrainedModel, "loss_function", None), "fset", None) is None,
    reason="loss_function can't be set in this transformers",
)
@pytest.mark.parametrize("kind", ["mean of texts", "all logits"])
def test_a_loss_function_may_read_any_logits(kind):
    """A mean for each text, or of logits that nothing scores."""

    def loss_function(logits, labels, vocab_size, **kwargs):
        if kind == "all logits":
            return logits.float().pow(2).mean()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        return (losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).mean()

    stock, ours = pair(tiny_model().train())
    stock.loss_function = ours.loss_function = loss_function
    check_step(stock, ours, **batch())
    empty = batch() | {"labels": torch.full((3, 17), -100)}
    torch.testing.assert_close(ours(**empty).loss, stock(**empty).loss)
    ours.eval()
    assert ours(**batch()).logits.shape == (3, 17, VOCAB)


def test_a_subclass_with_a_loss_of_its_own_keeps_it():
    class Smoothed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            shift = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            shift.loss = F.cross_entropy(shift.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.2)
            return shift

    plain = tiny_model()
    model = Smoothed._from_config(plain.config)
    model.load_state_dict(plain.state_dict())
    stock, ours = pair(model.train())
    loss = check_step(stock, ours, **batch())
    assert abs(loss - apply_mntp_head(plain)(**batch()).loss) > 1e-3


def test_a_router_loss_is_the_configs_where_the_call_says_none():
    stock, ours = pair(with_routers())
    check_step(stock, ours, **batch(), output_router_logits=None)


def test_a_forward_put_on_the_head_and_its_backward_hooks_run():
    stock, ours = pair(tiny_model().train())
    seen = []
    for m in (stock, ours):
        found = m.lm_head.forward
        m.lm_head.forward = lambda hidden, found=found: found(hidden) * 2
        m.lm_head.register_full_backward_hook(lambda *_: seen.append(1))
    check_step(stock, ours, **batch())
    assert len(seen) == 2


# A Trainer counts the labels of its whole step: 0 of them, or the first ones too, which nothing predicts.
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), torch.tensor(3)], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_nothing_scored_is_zero_with_zero_gradients(plain, items):
    model = apply_mntp_head(tiny_model().train())
    if not plain:
        model.lm_head.register_forward_hook(lambda *a: None)
    inputs = nothing_scored()
    out = model(**inputs, **({} if items is None else {"num_items_in_batch": items}))
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None and model.model.layers[0].mlp.up_proj.weight.grad is not None
    logits = model.eval()(**inputs).logits
    assert logits.shape == (3, 17, VOCAB) and not logits.any()


@pytest.mark.parametrize("items", [None] + [0, torch.tensor(0)] * LOSS_KWARGS, ids=str)
def test_nothing_scored_is_zero_beside_routers(items):
    model = apply_mntp_head(with_routers())
    loss = model(**nothing_scored(), **({} if items is None else {"num_items_in_batch": items})).loss
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("items", [None] + [0, torch.tensor(0)] * LOSS_KWARGS, ids=str)
@pytest.mark.parametrize("kind", ["chunked", "at once", "routers"])
def test_nothing_scored_is_no_number_in_evaluation(kind, items):
    """A 0 would lower the mean over batches; the mean over no token is no number. A part of a step still adds 0."""
    model = apply_mntp_head(with_routers() if kind == "routers" else tiny_model()).eval()
    if kind == "at once":
        model.lm_head.register_forward_hook(lambda *a: None)
    with torch.no_grad():
        assert model(**nothing_scored(), **({} if items is None else {"num_items_in_batch": items})).loss.isnan()
        if items is not None:
            some = torch.tensor(3) if isinstance(items, torch.Tensor) else 3
            assert model(**nothing_scored(), num_items_in_batch=some).loss.isfinite()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast, chunks):
    model = tiny_model().train()
    stock, ours = pair(model if autocast else model.bfloat16())
    exact = enable_bidirectional(copy.deepcopy(stock).float())
    grads = []
    for m in (exact, stock, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and m is not exact):
            loss = m(**batch()).loss
        assert loss.dtype == torch.float32
        loss.backward()
        grads.append([p.grad.float() for p in m.parameters()])
    assert all(p.grad.dtype == p.dtype for p in ours.parameters())
    error = [sum((a - b).norm() for a, b in zip(grads[0], g)) for g in grads[1:]]
    assert error[1] < 1.25 * error[0]  # no further from float32 than stock is


def test_float16_keeps_the_stock_order_of_scaling():
    stock, ours = pair(tiny_model().train().half())
    tiny = 2.0**-14  # gradients that only a scaled loss keeps
    for m in (stock, ours):
        (m(**batch()).loss * (tiny * 2**14)).backward()
    for a, b in zip(ours.parameters(), stock.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)


def test_bare_model_gets_its_head_around_the_same_backbone():
    bare = tiny_model(head=False)
    config, weights = bare.config.to_dict(), {n: p for n, p in bare.named_parameters()}
    model = apply_mntp_head(bare)
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, transformers.LlamaForCausalLM)
    assert model.model is bare and model.config is bare.config and bare.config.to_dict() == config
    assert all(p is weights[n.removeprefix("model.")] for n, p in model.named_parameters() if n != "lm_head.weight")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert 0.01 < model.lm_head.weight.std() < 0.03 and model.lm_head.weight is not bare.embed_tokens.weight
    assert is_bidirectional(model) and model.training == bare.training
    stock = enable_bidirectional(transformers.LlamaForCausalLM._from_config(bare.config, attn_implementation="sdpa"))
    stock.load_state_dict(model.state_dict())
    check_step(stock.train(), model.train(), **batch())


def test_bare_model_with_tied_embeddings():
    bare = tiny_model("gemma", head=False)
    model = apply_mntp_head(bare)
    assert model.lm_head.weight is bare.embed_tokens.weight
    model(**batch()).loss.backward()
    assert bare.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("head", [True, False])
def test_peft(head, chunks):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny_model(head=head), config).train()
    if head:
        stock, ours = pair(adapted)
        assert ours is adapted
    else:
        ours = apply_mntp_head(adapted)
        assert ours.model is adapted
        stock = enable_bidirectional(remove_mntp_head(copy.deepcopy(ours)))
    inputs = batch()
    check_step(stock, ours, **inputs)
    assert any(p.grad is not None and p.grad.any() for n, p in ours.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    stock, ours = pair(tiny_model().train())
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        for m in (stock, ours):
            m.enable_input_require_grads()
    check_step(stock, ours, **batch())


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    stock, ours = pair(tiny_model(num_hidden_layers=1).train())  # the head is the same above any number
    compiled = torch.compile(ours, backend="aot_eager")
    for seed in range(3):
        losses = [m(**batch(seed=seed)).loss for m in (stock, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (stock, ours))]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_trace_gives_the_loss_of_other_batches():
    model = apply_mntp_head(tiny_model().train())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, labels):
            return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(Loss(), tuple(batch(seed=0).values()), check_trace=False)
    for share, seed in ((0.4, 0), (0.4, 1), (0.1, 2)):
        inputs = batch(share, seed=seed)
        losses = model(**inputs).loss, traced(*inputs.values())
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in losses]
        torch.testing.assert_close(*grads)
