"""Training: gradients, gradient checkpointing, an optimizer."""

import functools

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import BidirectPatchError

from ..helpers.gradients import assert_gradients, gradients
from ..helpers.seeing import IDS, MASK, sees_all

pytestmark = pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # a loss is a loss


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, backend, reentrant, padded):
    model = enable_bidirectional(make_model(backend=backend).train())
    mask = MASK if padded else None
    expected = gradients(model, mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_gradients(gradients(model, mask), expected)
    with bidirectional(model, enabled=False):
        causal = gradients(model, mask)
    assert not torch.allclose(causal["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpoints_recomputed_after_the_block_are_right_or_refused(make_model, reentrant):
    """The backward of a checkpointed forward runs the layers again, maybe in another mode: never silently causal."""
    model = make_model().train()
    causal = gradients(model, None)
    with bidirectional(model):
        expected = gradients(model, None)
    assert not torch.allclose(causal["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    enable_bidirectional(model)
    try:
        actual = gradients(model, None, after=functools.partial(disable_bidirectional, model))
    except (BidirectPatchError, torch.utils.checkpoint.CheckpointError):
        return
    assert_gradients(actual, expected)


def test_a_training_step_moves_the_weights(make_model):
    model = enable_bidirectional(make_model().train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sees_all(model.eval())
