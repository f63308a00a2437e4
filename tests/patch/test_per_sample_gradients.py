"""Gradients of each sample by itself, with `torch.func`, beside a backward pass for each."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from bidirect_patch import apply_mntp_head, enable_bidirectional

from ..helpers.tiny_models import tiny_model

IDS = torch.tensor([[3, 17, 42, 9, 5], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
LABELS = torch.tensor([[-100, 17, -100, 9, -100], [-100, -100, -100, 11, 12]])
NONE = torch.full_like(LABELS, -100)


@pytest.mark.parametrize("head", [False, True], ids=["stock loss", "MNTP head"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_they_are_those_of_a_backward_pass_each(head, sinks):
    model = enable_bidirectional(tiny_model(), num_sink_tokens=sinks)
    if head:
        apply_mntp_head(model)
    check(model, LABELS)


def test_a_sample_of_which_nothing_is_scored_has_none():
    model = apply_mntp_head(tiny_model()).train()
    check(model, torch.stack([LABELS[0], NONE[0]]))
    gradients = per_sample(model, NONE)
    assert all(not each.any() for each in gradients.values())


def per_sample(model, labels):
    def loss(parameters, ids, mask, labels):
        call = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return functional_call(model, parameters, (), call).loss

    parameters = {name: each.detach() for name, each in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, IDS, MASK, labels)


def check(model, labels):
    gradients = per_sample(model, labels)
    for i in range(len(IDS)):
        model.zero_grad()
        one = slice(i, i + 1)
        model(input_ids=IDS[one], attention_mask=MASK[one], labels=labels[one]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, atol=1e-6, rtol=1e-4)
