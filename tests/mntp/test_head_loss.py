"""The MNTP head against the stock forward of the same bidirectional model: loss, gradients, logits, cost."""

import copy
import importlib.metadata
import inspect
import io
import os
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from bidirect_patch import apply_mntp_head, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import AttentionMaskError, HeadError, LabelLeakWarning, UnsupportedModelError
from bidirect_patch.mntp import head as mntp_head
from bidirect_patch.mntp import loss as linear_loss
from bidirect_patch.mntp.head import MNTPHead, remove_mntp_head
from bidirect_patch.mntp.metrics import mntp_metrics
from bidirect_patch.swap.classes import has_mixin

from ..conftest import FAMILIES, SIZES, TRANSFORMERS, tiny_config, tiny_model

VOCAB, MASK = SIZES["vocab_size"], 2
LOSS_KWARGS = TRANSFORMERS >= Version("4.47")  # forward hands loss arguments on to the loss


@pytest.fixture(params=[VOCAB, 7], ids=["one-chunk", "chunks-of-7-rows"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * VOCAB * request.param)


def batch(share=0.4, shape=(3, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    scored = torch.rand(shape, generator=generator) < share
    return dict(input_ids=torch.where(scored, MASK, ids), labels=torch.where(scored, ids, -100))


def pair(model, **kwargs):
    """The stock forward of a bidirectional copy of `model`, and `model` with the head."""
    stock = enable_bidirectional(copy.deepcopy(model))
    return stock, apply_mntp_head(model, **kwargs)


def check_step(stock, ours, tolerance=1e-6, **inputs):
    """One training step of each: the same loss, the same gradient as a whole, and close for every parameter."""
    losses = []
    for model in (stock, ours):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    error = norm = 0.0
    for (name, a), b in zip(ours.named_parameters(), stock.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            largest = b.grad.abs().max().clamp(min=1.0)
            assert (a.grad - b.grad).abs().max() <= 5 * tolerance * largest, name
            error, norm = error + (a.grad - b.grad).norm() ** 2, norm + b.grad.norm() ** 2
    assert error**0.5 <= tolerance * norm**0.5
    return losses[1]


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


def with_routers(output_router_logits=True):
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, output_router_logits=output_router_logits, router_aux_loss_coef=0.5
    )
    return transformers.MixtralForCausalLM._from_config(config, attn_implementation="eager").train()


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


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_packed_rows_of_a_model_that_drops_positions_are_refused(family):
    names = {"Bloom": ("n_layer", "n_head", "hidden_size"), "Mpt": ("n_layers", "n_heads", "d_model")}[family]
    config = getattr(transformers, f"{family}Config")(**dict(zip(names, (2, 4, 32))), vocab_size=VOCAB)
    model = apply_mntp_head(getattr(transformers, f"{family}ForCausalLM")(config))
    inputs = batch(shape=(1, 8))
    if not {"position_ids", "kwargs", "deprecated_arguments"} & set(inspect.signature(type(model).forward).parameters):
        pytest.skip("this transformers refuses position_ids by itself")
    model(**inputs, position_ids=torch.arange(8)[None])
    padded = dict(attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]]))
    model(**inputs, **padded)  # one document, padded on the left
    for positions in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6]):
        for given in (inputs, {"input_ids": inputs["input_ids"]}):  # without labels a Trainer smooths its loss itself
            with pytest.raises(AttentionMaskError, match="takes no position_ids"):
                model(**given, position_ids=torch.tensor([positions]))


def test_scores_are_the_predictions_and_their_losses(chunks):
    stock, ours = pair(tiny_model(), eval_logits="scores")
    inputs = batch()
    with torch.no_grad():
        logits, scores = stock(**inputs).logits, ours(**inputs).logits
    scored = inputs["labels"][:, 1:] != -100
    targets = inputs["labels"][:, 1:][scored]
    assert scores.shape == (3, 17, 2)
    assert torch.equal(scores[:, :-1, 0][scored], logits[:, :-1][scored].argmax(-1).float())
    torch.testing.assert_close(scores[:, :-1, 1][scored], F.cross_entropy(logits[:, :-1][scored], targets, reduction="none"))
    assert not scores[:, :-1][~scored].any() and not scores[:, -1].any()


class Largest(TorchDispatchMode):
    """The most rows of any tensor with a last dimension of `vocab` that was made."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) == (SIZES["hidden_size"], self.vocab):
                continue  # the head's weight, transposed
            if tensor.dim() and tensor.shape[-1] == self.vocab:
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return out


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_no_logits_but_those_scored(share, chunk, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * VOCAB * chunk)
    stock, ours = pair(tiny_model().train())
    inputs = batch(share, (4, 30))
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    with Largest(VOCAB) as seen:
        ours(**inputs).loss.backward()
    assert seen.rows == min(chunk, scored)
    with Largest(VOCAB) as seen:
        stock(**inputs).loss.backward()
    assert seen.rows >= 4 * 29
    ours.eval()
    remove_mntp_head(ours)
    apply_mntp_head(ours, eval_logits="argmax")
    with Largest(VOCAB) as seen, torch.no_grad():
        ours(**inputs)
    assert seen.rows == min(chunk, scored)


FUSED = """
import torch, transformers
from bidirect_patch.mntp import loss as linear_loss
from tests.conftest import SIZES, tiny_model
from tests.mntp.test_head_loss import batch, check_step, pair

calls = []
kernel = linear_loss._liger()
linear_loss._on_gpu = lambda tensor: True
linear_loss._liger = lambda: lambda *tensors: (calls.append(1), kernel(*tensors))[1]
for frozen in (False, True):
    stock, ours = pair(tiny_model().train())
    for model in (stock, ours):
        model.lm_head.requires_grad_(not frozen)
    check_step(stock, ours, 1e-5, **batch())
    check_step(stock, ours, 1e-5, **batch(), num_items_in_batch=torch.tensor(11))
assert len(calls) == 4, calls
for wrong in (dict(retain_graph=True), dict(create_graph=True)):
    loss = ours(**batch()).loss
    try:
        loss.backward(**wrong)
        loss.backward()
        raise SystemExit("a second backward went through")
    except RuntimeError as error:
        assert "one backward" in str(error)
assert len(calls) == 6, calls
ours(**{**batch(), "labels": torch.full((3, 17), -100)}).loss.backward()
ours.eval()(**batch())  # which wants logits
config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.7)
capped = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").train()
check_step(*pair(capped), 1e-5, **batch())
stock, ours = pair(tiny_model().train())
for model in (stock, ours):
    model.model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
check_step(stock, ours, 1e-5, **batch())
assert len(calls) == 6, calls
"""


@pytest.mark.slow
def test_the_fused_kernel_of_liger_gives_the_stock_loss():
    """On a GPU it is used by itself; here Triton interprets the same kernel on the CPU."""
    pytest.importorskip("liger_kernel.transformers", reason="liger-kernel isn't installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def blanked(logits):
    """As Chameleon does to its image tokens."""
    logits[:, 2:4] = torch.finfo(logits.dtype).min
    return logits


FINISHES = {
    "as it is": lambda x: x,
    "cast": lambda x: x.float(),
    "capped": lambda x: torch.tanh(x / 2) * 2,
    "cut": lambda x: x[..., :-4],
    "scaled in place": lambda x: x.mul_(2),
    "written into": blanked,
}


@pytest.mark.parametrize("rows", [0, 1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
def test_whatever_a_family_does_to_its_logits(finish, dtype, rows, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * VOCAB * 4)
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 8), (VOCAB, 8), (VOCAB,)
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    targets = torch.randint(4, VOCAB - 4, (rows,), generator=generator)
    want = F.cross_entropy(finish(F.linear(hidden, weight, bias)).float(), targets, reduction="sum")
    wanted = torch.autograd.grad(want, (hidden, weight, bias))
    loss = linear_loss.total(hidden, weight, bias, targets, finish, None)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(loss, want, **tolerance)
    for found, expected in zip(torch.autograd.grad(loss, (hidden, weight, bias)), wanted):
        torch.testing.assert_close(found, expected, **tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(linear_loss.total(hidden, weight, bias, targets, finish, None), want, **tolerance)


def nothing_scored():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 0] = 5  # nothing comes before the first token, so it can't be scored
    return inputs


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


def test_outputs_without_labels_and_as_tuples():
    stock, ours = pair(tiny_model())
    ids = batch()["input_ids"]
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=0)
    out = ours.train()(**batch(), output_hidden_states=True)
    assert out.logits is None and len(out.hidden_states) == 3
    pieces = ours(**batch(), output_hidden_states=True, return_dict=False)
    assert torch.equal(pieces[0], out.loss) and len(pieces[1]) == 3
    torch.testing.assert_close(ours(**batch(), skip_logits=False).logits, ours.eval()(**batch()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("plain", [True, False])
def test_evaluation_logits_correspond_to_labels(plain, chunks):
    stock, ours = pair(tiny_model())
    if not plain:
        ours.lm_head.register_forward_hook(lambda *a: None)
    inputs = batch()
    with torch.no_grad():
        full, expected = ours(**inputs).logits, stock(**inputs).logits
        apply_mntp_head(ours, eval_logits="argmax")
        tokens = ours(**inputs).logits
    scored = F.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    torch.testing.assert_close(full[scored], expected[scored], rtol=1e-6, atol=1e-6)
    assert not full[~scored].any()
    assert tokens.shape == (3, 17) and torch.equal(tokens[scored], expected.argmax(-1)[scored])
    assert (tokens[~scored] == -100).all()


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {k: v[0] for k, v in batch(shape=(1, 17), seed=i).items()}


def trainer(model, tmp_path, **kwargs):
    accelerate = Version(importlib.metadata.version("accelerate"))
    if TRANSFORMERS < Version("4.41") and accelerate >= Version("1.0"):
        pytest.skip(f"the Trainer of transformers {TRANSFORMERS} can't be made with accelerate {accelerate}")
    settings = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.01,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=True,
    )
    metrics = {k: kwargs.pop(k) for k in ("compute_metrics",) if k in kwargs}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings, **kwargs)
    return Trainer(model=model, args=arguments, train_dataset=Data(), eval_dataset=Data(), **metrics)


def accuracy(prediction):
    tokens, labels = prediction.predictions, prediction.label_ids[:, 1:]
    tokens = (tokens.argmax(-1) if tokens.ndim == 3 else tokens)[:, :-1]
    return {"accuracy": float((tokens == labels)[labels != -100].mean())}


@pytest.mark.parametrize("eval_logits", ["full", "argmax"])
def test_trainer_evaluates_as_stock(eval_logits, tmp_path):
    stock, ours = pair(tiny_model(), eval_logits=eval_logits)
    for model in (stock, ours):  # an accuracy that isn't 0
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for seed in range(8):
            model(**batch(seed=seed, shape=(1, 17))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = trainer(stock, tmp_path, compute_metrics=accuracy).evaluate()
    found = trainer(ours, tmp_path, compute_metrics=accuracy).evaluate()
    assert found["eval_accuracy"] == pytest.approx(expected["eval_accuracy"]) and 0 < found["eval_accuracy"] < 1
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [dict(gradient_accumulation_steps=2), dict(label_smoothing_factor=0.2)], ids=str)
def test_trainer_trains_as_stock(settings, tmp_path):
    trained = []
    for model in pair(tiny_model()):
        run = trainer(model, tmp_path, max_steps=2, optim="sgd", **settings)
        trained.append((run.train().training_loss, [p.detach().clone() for p in model.parameters()]))
    assert trained[1][0] == pytest.approx(trained[0][0], rel=1e-6)
    before = list(tiny_model().parameters())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(trained[1][1], before))
    for a, b in zip(trained[1][1], trained[0][1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_trainer_gets_over_a_step_with_nothing_scored(tmp_path, monkeypatch):
    """As a batch of one short text may be: Trainer then divides by 0 labels, and NaN would be in every weight for good."""
    monkeypatch.setattr(Data, "__getitem__", lambda self, i: {k: v[0] for k, v in nothing_scored().items()})
    model = apply_mntp_head(tiny_model())
    before = [p.detach().clone() for p in model.parameters()]
    trainer(model, tmp_path, max_steps=2, optim="sgd").train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


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


BART = dict(vocab_size=61, d_model=16, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2)


def test_errors_come_before_any_change():
    for model in (
        torch.nn.Linear(2, 2),
        transformers.LlamaForSequenceClassification(tiny_config("llama")),
        torch.nn.ModuleList([tiny_model(head=False)]),
        transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
        transformers.BartForCausalLM(transformers.BartConfig(**BART)),  # whose loss has no shift
        "Llama",
    ):
        with pytest.raises(HeadError):
            apply_mntp_head(model)
        if isinstance(model, torch.nn.Module):
            assert not any(hasattr(m, "_original") for m in model.modules())
    model = tiny_model()
    with pytest.raises(HeadError, match="'all'"):
        apply_mntp_head(model, eval_logits="all")
    assert not is_bidirectional(model)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError):
        apply_mntp_head(mamba)
    assert type(mamba) is transformers.MambaForCausalLM


def test_the_way_back_and_copies():
    model = tiny_model().train()
    state, original = dict(model.__dict__), type(model)
    applied = apply_mntp_head(apply_mntp_head(model))  # idempotent
    assert applied is model and type(model) is not original and isinstance(model, original)
    assert str(type(model)) == str(original)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(**batch()).loss, model(**batch()).loss)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        assert not torch.equal(twin(**batch()).loss, model(**batch()).loss)
        assert not has_mixin(remove_mntp_head(twin), MNTPHead) and has_mixin(model, MNTPHead)
        assert is_bidirectional(twin) and type(disable_bidirectional(twin)) is original
    assert remove_mntp_head(remove_mntp_head(model)) is model
    assert is_bidirectional(model) and not has_mixin(model, MNTPHead)
    assert disable_bidirectional(model) is model
    assert type(model) is original and model.__dict__ == state


def test_the_attention_may_go_back_before_the_head():
    model = tiny_model().train()
    state, original = dict(model.__dict__), type(model)
    causal = copy.deepcopy(model)(**batch()).loss
    apply_mntp_head(model)
    assert "MNTP head" in repr(model)
    disable_bidirectional(model)
    assert has_mixin(model, MNTPHead) and model(**batch()).logits is None
    torch.testing.assert_close(model(**batch()).loss, causal)
    assert type(remove_mntp_head(model)) is original and model.__dict__ == state


@pytest.mark.parametrize("was_bidirectional", [True, False])
def test_a_head_that_fails_after_enabling_changes_nothing(was_bidirectional, monkeypatch):
    model = tiny_model()
    if was_bidirectional:
        enable_bidirectional(model)
    classes, put = [type(module) for module in model.modules()], mntp_head.apply

    def fails(add=(), remove=()):
        put(remove=remove)
        if add:
            raise KeyboardInterrupt

    monkeypatch.setattr(mntp_head, "apply", fails)
    with pytest.raises(KeyboardInterrupt):
        apply_mntp_head(model)
    assert is_bidirectional(model) == was_bidirectional
    assert [type(module) for module in model.modules()] == classes


def in_autocast(model, dtype):
    """What accelerate's `prepare` puts on a model; for bfloat16, the thing itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import convert_outputs_to_fp32

    if dtype == torch.bfloat16:
        AcceleratorState._reset_state(True)  # which is one per process, and of a Trainer before
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, device_placement=False)
        AcceleratorState._reset_state(True)
        return prepared
    forward = torch.autocast("cpu", dtype)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(forward), model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_head_may_come_after_mixed_precision_and_go_before_it(dtype, chunks, monkeypatch):
    in_chunks, total = [], linear_loss.total
    monkeypatch.setattr(linear_loss, "total", lambda *given: in_chunks.append(1) or total(*given))
    stock, ours = (in_autocast(m, dtype) for m in (enable_bidirectional(tiny_model().train()), tiny_model().train()))
    wrapper = ours.forward
    apply_mntp_head(ours)
    scale = 2.0**10  # as a GradScaler does in float16, where a gradient taken before it would vanish
    for m in (stock, ours):
        loss = m(**batch()).loss
        assert loss.dtype == torch.float32
        (loss * scale).backward()
    assert bool(in_chunks) == (dtype != torch.float16)
    assert ours(**batch()).logits is None
    for a, b in zip(ours.parameters(), stock.parameters()):
        torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=0.05, atol=0.02)
    remove_mntp_head(ours)
    assert ours(**batch()).logits is not None
    disable_bidirectional(ours)
    assert ours.forward == wrapper and type(ours) is transformers.LlamaForCausalLM


def test_the_product_of_the_head_is_in_the_dtype_of_the_wrapper(chunks):
    ours = apply_mntp_head(in_autocast(tiny_model().train(), torch.bfloat16))
    early = in_autocast(apply_mntp_head(tiny_model().train()), torch.bfloat16)
    losses = [m(**batch()).loss for m in (ours, early)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_the_head_goes_after_a_trainer_with_mixed_precision(tmp_path):
    model = apply_mntp_head(tiny_model())
    trainer(model, tmp_path, max_steps=1, bf16=True).train()
    remove_mntp_head(model)
    assert not has_mixin(model, MNTPHead) and model(**batch()).logits is not None


def test_a_second_backward_is_refused_not_wrong():
    loss = apply_mntp_head(tiny_model().train())(**batch()).loss
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        (loss * 2).backward()
    model = apply_mntp_head(tiny_model().train())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(**batch()).loss, list(model.parameters()), create_graph=True)


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
    stock, ours = pair(tiny_model().train())
    compiled = torch.compile(ours, backend="aot_eager")
    for seed in range(3):
        losses = [m(**batch(seed=seed)).loss for m in (stock, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (stock, ours))]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _rank(rank, folder, inputs):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = apply_mntp_head(tiny_model().train())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(**{k: v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}).loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort or hang once in some ten times when a process group is destroyed


@pytest.mark.slow
def test_two_ranks_average_to_the_gradients_of_both(tmp_path):
    inputs = batch(shape=(4, 17))
    torch.multiprocessing.spawn(_rank, (str(tmp_path), inputs), nprocs=2)
    stock = enable_bidirectional(tiny_model().train())
    halves = [{k: v[at : at + 2] for k, v in inputs.items()} for at in (0, 2)]
    (sum(stock(**half).loss for half in halves) / 2).backward()
    for rank in "01":
        for a, b in zip(torch.load(tmp_path / rank), stock.parameters()):
            torch.testing.assert_close(a, b.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("wrong", [dict(labels=slice(0, 1)), dict(logits_to_keep=4)], ids=["fewer-labels", "logits-to-keep"])
def test_labels_that_fit_no_row_are_refused(wrong):
    """Picked by their place, they would score the wrong positions without a word."""
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    if "labels" in wrong:
        inputs["labels"] = inputs["labels"][wrong["labels"]]
    else:
        inputs.update(wrong)
    with pytest.raises(HeadError, match="labels"):
        model(**inputs)


def test_labels_may_be_of_any_integer_and_of_nothing_else():
    model, inputs = apply_mntp_head(tiny_model()), batch()
    expected = model(**inputs).loss
    assert torch.equal(model(**{**inputs, "labels": inputs["labels"].int()}).loss, expected)
    for wrong, said in ((inputs["labels"].float(), "float32"), (inputs["labels"].tolist(), "list")):
        with pytest.raises(HeadError, match=said):
            model(**{**inputs, "labels": wrong})


@pytest.mark.skipif(TRANSFORMERS >= Version("4.47"), reason="this transformers calls the head whatever pretraining_tp says")
def test_a_head_that_is_sliced_instead_of_called_is_refused():
    model = tiny_model(pretraining_tp=2)
    with pytest.raises(HeadError, match="pretraining_tp = 1"):
        apply_mntp_head(model)
    assert not is_bidirectional(model)
    model.config.pretraining_tp = 1
    apply_mntp_head(model)


@pytest.mark.parametrize("wrong, said", [(VOCAB, f"the id {VOCAB}: give ids from 0 below {VOCAB}"), (-1, "the id -1")])
@pytest.mark.parametrize("plain", [True, False])
def test_labels_that_are_no_ids_are_refused(plain, wrong, said):
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    if not plain:
        model.lm_head.register_forward_hook(lambda *a: None)
    inputs["labels"][0, 0] = wrong  # nothing predicts it
    model(**inputs)
    inputs["labels"][1, 3] = wrong
    with pytest.raises(HeadError, match=said):
        model(**inputs)


@pytest.mark.parametrize("shape", [(51,), (3, 17, 1)], ids=str)
def test_labels_of_other_dimensions_are_refused(shape):
    inputs = batch()
    model = apply_mntp_head(tiny_model().train())
    with pytest.raises(HeadError, match="labels"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"].reshape(shape))
    with pytest.raises(HeadError, match="labels must have the shape"):
        model(labels=inputs["labels"].reshape(shape))


def test_arguments_by_place_are_those_of_the_stock_forward():
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    mask = torch.ones_like(inputs["input_ids"])
    names = [name for name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters if name != "self"]
    given = {**inputs, "attention_mask": mask}
    places = [given.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*places).loss, model(**given).loss)
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"])
    with pytest.raises(TypeError, match="positional"):
        model(inputs["input_ids"], *[None] * 40)


def test_labels_that_leak_are_told_of():
    inputs = batch()
    model = apply_mntp_head(tiny_model().train())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelLeakWarning)
        model(**inputs)
        model(input_ids=inputs["labels"].clamp(min=0), attention_mask=None)
    leaking = apply_mntp_head(tiny_model().train())
    with pytest.warns(LabelLeakWarning, match="copy"):
        leaking(input_ids=inputs["input_ids"], labels=inputs["input_ids"])


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


@pytest.mark.parametrize("form", ["full", "argmax", "scores"])
def test_metrics_of_every_form(form):
    model = apply_mntp_head(tiny_model(), eval_logits=form)
    inputs = batch()
    with torch.no_grad():
        out = model(**inputs)
        expected = enable_bidirectional(tiny_model())(input_ids=inputs["input_ids"]).logits[:, :-1]
    targets = inputs["labels"][:, 1:]
    scored = targets != -100
    wider = [(0, 0), (0, 2), *[(0, 0)] * (out.logits.ndim - 2)]  # as the Trainer pads one batch to another's length
    predictions = np.pad(out.logits.numpy(), wider, constant_values=-100)
    labels = np.pad(inputs["labels"].numpy(), wider[:2], constant_values=-100)
    found = mntp_metrics(transformers.EvalPrediction(predictions, labels))
    right = (expected.argmax(-1) == targets)[scored]
    assert found["accuracy"] == pytest.approx(right.float().mean().item()) and found["masked_tokens"] == int(scored.sum())
    assert ("loss" in found) == (form == "scores")
    if form == "scores":
        assert found["loss"] == pytest.approx(F.cross_entropy(expected[scored], targets[scored]).item(), rel=1e-5)


def test_metrics_of_nothing_and_of_other_shapes():
    labels = torch.full((2, 5), -100).numpy()
    of_nothing = mntp_metrics(transformers.EvalPrediction(labels, labels))
    assert of_nothing["masked_tokens"] == 0 and of_nothing["accuracy"] != of_nothing["accuracy"]
    for wrong in (labels[0], labels[:, :4], labels[:1]):
        with pytest.raises(HeadError, match="predictions of shape"):
            mntp_metrics(transformers.EvalPrediction(wrong, labels))


def test_a_trainer_reports_the_mean_over_all_masked_tokens(tmp_path, monkeypatch):
    shares = {i: 0.1 + 0.1 * i for i in range(8)}
    monkeypatch.setattr(Data, "__getitem__", lambda self, i: {k: v[0] for k, v in batch(shares[i], (1, 17), i).items()})
    model = apply_mntp_head(tiny_model(), eval_logits="scores")
    found = trainer(model, tmp_path, compute_metrics=mntp_metrics).evaluate()
    whole = {k: torch.stack([Data()[i][k] for i in range(8)]) for k in Data()[0]}
    assert found["eval_masked_tokens"] == (whole["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(model(**whole).loss.item(), rel=1e-5)
