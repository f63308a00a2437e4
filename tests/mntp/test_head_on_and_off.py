"""The MNTP head goes on and off, also around mixed precision and on two ranks."""

import copy
import io
import types

import pytest
import torch
import transformers

from bidirect_patch import apply_mntp_head, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.mntp import head as mntp_head
from bidirect_patch.mntp import loss as linear_loss
from bidirect_patch.mntp.head import MNTPHead, remove_mntp_head
from bidirect_patch.swap.classes import has_mixin

from ..helpers.heads import batch, trainer
from ..helpers.processes import in_two_ranks
from ..helpers.tiny_models import tiny_model


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
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]

    def fails(add=(), remove=()):
        put(remove=remove)
        if add:
            raise KeyboardInterrupt

    monkeypatch.setattr(mntp_head, "apply", fails)
    with pytest.raises(KeyboardInterrupt):
        apply_mntp_head(model)
    assert is_bidirectional(model) == was_bidirectional
    assert [type(module) for module in model.modules()] == classes
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


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


RANK = """
import os, sys, torch
from bidirect_patch import apply_mntp_head
from tests.helpers.tiny_models import tiny_model

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = apply_mntp_head(tiny_model().train())
parallel = torch.nn.parallel.DistributedDataParallel(model)
inputs = torch.load(sys.argv[1] + "/inputs")
parallel(**{name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}).loss.backward()
torch.save([p.grad for p in model.parameters()], f"{sys.argv[1]}/{rank}")
torch.distributed.barrier()
os._exit(0)  # gloo's threads abort or hang once in some ten times when a process group is destroyed
"""


@pytest.mark.slow
def test_two_ranks_average_to_the_gradients_of_both(tmp_path):
    inputs = batch(shape=(4, 17))
    torch.save(inputs, tmp_path / "inputs")
    in_two_ranks("-c", RANK, tmp_path)
    stock = enable_bidirectional(tiny_model().train())
    halves = [{k: v[at : at + 2] for k, v in inputs.items()} for at in (0, 2)]
    (sum(stock(**half).loss for half in halves) / 2).backward()
    for rank in "01":
        for a, b in zip(torch.load(tmp_path / rank), stock.parameters()):
            torch.testing.assert_close(a, b.grad, rtol=1e-5, atol=2e-6)
