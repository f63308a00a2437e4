"""The loss in chunks: what is never made, the fused kernel, and what a family does to its logits."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bidirect_patch import apply_mntp_head
from bidirect_patch.mntp import loss as linear_loss
from bidirect_patch.mntp.head import remove_mntp_head

from ..helpers.heads import VOCAB, batch, pair
from ..helpers.tiny_models import SIZES, tiny_model


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
from tests.helpers.heads import batch, check_step, pair
from tests.helpers.tiny_models import SIZES, tiny_model

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
    """As Chameleon does to its image tokens, some of which are among the last of the vocabulary."""
    logits[:, [2, 3, VOCAB - 2]] = torch.finfo(logits.dtype).min
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


def test_a_second_backward_is_refused_not_wrong():
    loss = apply_mntp_head(tiny_model().train())(**batch()).loss
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        (loss * 2).backward()
    model = apply_mntp_head(tiny_model().train())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(**batch()).loss, list(model.parameters()), create_graph=True)
