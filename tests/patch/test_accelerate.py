"""Models that accelerate's `prepare` has wrapped, and unwraps again."""

import pytest
import torch

from bidirect_patch import (
    apply_mntp_head,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
    remove_mntp_head,
)

from ..helpers.one_text import BOTH, CAUSAL, IDS, moves, moves_real
from ..helpers.tiny_models import SIZES, causal_lm, llama


@pytest.fixture
def prepared():
    """accelerate's `prepare` with bfloat16, which wraps the forward on the instance, and its `unwrap_model`."""
    accelerate = pytest.importorskip("accelerate")

    def prepare(model):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        return accelerator.prepare(model), accelerator

    return prepare


@pytest.mark.parametrize("first", ["patch", "prepare"])
@pytest.mark.parametrize("keep", [True, False])
def test_unwrapping_does_not_undo_the_patch(prepared, first, keep):
    model = llama()
    if first == "patch":
        enable_bidirectional(model)
    wrapped, accelerator = prepared(model)
    enable_bidirectional(wrapped)
    assert moves_real(wrapped) == BOTH[:7] and is_bidirectional(model)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=keep)
    assert moves_real(model) == BOTH[:7] and is_bidirectional(model)
    disable_bidirectional(model)
    assert moves_real(model) == CAUSAL[-7:] and not is_bidirectional(model)
    enable_bidirectional(model)
    assert moves_real(model) == BOTH[:7] and is_bidirectional(model)


def test_head_after_prepare_and_off_after_it(prepared):
    model = causal_lm()
    wrapped, _ = prepared(model)
    apply_mntp_head(wrapped)
    labels = torch.where(IDS % 2 == 0, IDS, -100)
    hidden = torch.where(IDS % 2 == 0, 3, IDS)
    assert wrapped(input_ids=hidden, labels=labels).loss.isfinite() and moves(model) == BOTH
    remove_mntp_head(model)
    assert model(input_ids=hidden, labels=labels).logits.shape[-1] == SIZES["vocab_size"]
    disable_bidirectional(model)
    assert moves(model) == CAUSAL
