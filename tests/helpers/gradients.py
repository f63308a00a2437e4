"""Gradients of the stock loss."""

import torch
import torch.utils.checkpoint

from .seeing import IDS, MASK


def gradients(model, attention_mask=MASK, after=None):
    """The gradient of each parameter of the stock loss; `after` runs between forward and backward."""
    model.zero_grad()
    labels = IDS.masked_fill(IDS == 0, -100)
    loss = model(IDS, attention_mask=attention_mask, labels=labels, use_cache=False).loss
    if after:
        after()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
