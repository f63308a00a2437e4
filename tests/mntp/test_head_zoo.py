"""The MNTP head of every architecture against the shifted cross-entropy of its logits, written out."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

from bidirect_patch import apply_mntp_head, enable_bidirectional
from bidirect_patch.errors import HeadError, UnsupportedModelError
from bidirect_patch.mntp import loss as linear_loss

from ..helpers import zoo
from ..helpers.slow import some_slow

SHAPE = (3, 11)


def batch(model):
    inputs = zoo.inputs(model, *SHAPE)
    scored = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.4
    attention_mask = torch.ones(SHAPE, dtype=torch.long)
    attention_mask[1, 8:] = 0
    labels = torch.where(scored & attention_mask.bool(), inputs["input_ids"], -100)
    labels[:, 0] = zoo.FIRST_ID  # which nothing predicts
    return inputs, attention_mask, labels


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("model_type", some_slow(zoo.buildable_types(), lambda name: name not in zoo.UNLIKE_LLAMA))
@pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # a loss is a loss
@pytest.mark.skipif(zoo.RELEASE > zoo.NEWEST, reason=f"the zoo knows the types of {zoo.NEWEST} and older releases")
def test_the_loss_is_the_shifted_cross_entropy(model_type, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 4 * 128 * 3)
    model = zoo.build(model_type)
    reference = copy.deepcopy(model)
    try:
        apply_mntp_head(model)
    except (HeadError, UnsupportedModelError) as error:
        assert isinstance(error, UnsupportedModelError) or model_type in zoo.NO_MNTP_HEAD
        assert type(model) is type(reference)
        return

    inputs, attention_mask, labels = batch(model)
    inputs["attention_mask"] = attention_mask
    logits = enable_bidirectional(reference)(**inputs).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    wanted = gradients(reference)
    for hooked in (False, True):  # a hook on the head wants its logits made by the head itself
        if hooked:
            head = model.get_output_embeddings() or model.language_model.get_output_embeddings()  # Fuyu's, in 4.39
            head.register_forward_hook(lambda *given: None)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert torch.stack([(found[name] - wanted[name]).norm() for name in wanted]).norm() <= 1e-5 * norm

        with torch.no_grad():
            assert model(**inputs, labels=torch.full_like(labels, -100)).loss.isnan()
        takes_kinds = "token_type_ids" in inspect.signature(model.forward).parameters  # some want them in training
        kinds = {"token_type_ids": torch.zeros_like(labels)} if takes_kinds else {}
        model.train().zero_grad()
        loss = model(**inputs, **kinds, labels=torch.full_like(labels, -100)).loss
        loss.backward()
        assert loss == 0 and not gradients(model)
        model.eval()
