"""What the MNTP head gives beside the loss: logits, scores, metrics; under a Trainer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from bidirect_patch import apply_mntp_head, enable_bidirectional
from bidirect_patch.errors import HeadError
from bidirect_patch.mntp.metrics import mntp_metrics

from ..helpers.heads import Data, batch, nothing_scored, pair, trainer
from ..helpers.tiny_models import tiny_model


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


def test_batches_with_nothing_scored_do_not_lower_the_loss_of_an_evaluation(tmp_path, monkeypatch):
    """As Trainer says of the stock loss: the mean over what is scored, or no number on releases that take those batches in."""
    made = Data.__getitem__

    def mostly_empty(self, i):
        given = made(self, i)
        return given if i == 3 else {**given, "labels": torch.full_like(given["labels"], -100)}

    monkeypatch.setattr(Data, "__getitem__", mostly_empty)
    losses = [trainer(m, tmp_path, per_device_eval_batch_size=1).evaluate()["eval_loss"] for m in pair(tiny_model())]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, nan_ok=True)
    assert losses[1] > 1 or np.isnan(losses[1])


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
