"""The cross-entropy of a linear head's logits, summed over rows, with never more than a chunk of them alive.

On a GPU where Liger-Kernel is installed, its fused kernel makes it; else the rows go in chunks here, and each chunk's
gradient is taken at once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 108 * 2**20  # logits of one chunk in float32: fewer rows than some 200 leave a matrix product waiting for memory


def total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, finish: Callable[[Tensor], Tensor], kept: Any
) -> Tensor:
    """The sum of the cross-entropies in nats, (), float32.

    hidden: (n, width). weight: (vocab, width). bias: (vocab,) or None. targets: (n,), int64. finish: what the family does
    to raw logits (rows, vocab). kept: gets each chunk's logits by `add(rows, logits, targets)`; None where none are wanted.
    """
    does = _what_it_does(finish, weight)
    # Liger gives the head no gradient where the rows need none, and wants one dtype.
    fits = does.keeps and kept is None and len(hidden) and hidden.requires_grad and hidden.dtype == weight.dtype
    fused = _liger() if fits and _on_gpu(hidden) else None
    if fused is None:
        return _ChunkedLoss.apply(hidden, weight, bias, targets, finish, does, kept, torch.is_grad_enabled())
    with torch.cuda.device_of(hidden):  # Triton launches on the current one
        return _Once.apply(fused(weight, hidden, targets, bias))


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype a product with `weight` is taken: autocast's, or its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@cache
def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    except (ImportError, TypeError):  # before 0.6.3 it sums a bfloat16 head's gradient in bfloat16
        return None


class _Does(NamedTuple):
    """What a family's `finish` does to raw logits: hands them on as they are; writes into them."""

    keeps: bool
    writes: bool


def _what_it_does(finish: Callable[[Tensor], Tensor], weight: Tensor) -> _Does:
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version
        raw = weight.new_zeros(1, weight.shape[0], dtype=matmul_dtype(weight))
        version = raw._version
        out = finish(raw)
        writes = raw._version != version
        same = (out.data_ptr(), out.shape, out.dtype) == (raw.data_ptr(), raw.shape, raw.dtype)
    return _Does(same and not writes, writes)


def _check_once(ctx: Any) -> None:
    """Gradients that were made on the way forward, and are scaled in place, can be taken once."""
    if torch.is_grad_enabled() or ctx.used:
        raise RuntimeError(
            "the loss of apply_mntp_head has one backward, which takes the gradients that its forward made: for a second "
            "one, or for create_graph=True, use the stock loss (bidirect_patch.head.remove_mntp_head)"
        )
    ctx.used = True


class _Once(torch.autograd.Function):
    """A loss as it is, whose backward may run once."""

    @staticmethod
    def forward(ctx, loss):
        ctx.used = False
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        _check_once(ctx)
        return grad


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `finish(hidden @ weight.T + bias)`, its gradient taken on the way forward.

    hidden: (n, width). weight: (vocab, width). bias: (vocab,) or None. targets: (n,), int64.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, finish, does, kept, with_grad):
        needs = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        dtype = matmul_dtype(weight)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        d_hidden: Any = torch.empty_like(hidden) if needs[0] else None
        d_weight: Any = None
        d_bias: Any = torch.zeros_like(bias) if needs[2] else None
        loss = torch.zeros((), device=hidden.device)
        size = max(1, min(CHUNK_BYTES // (4 * weight.shape[0]), len(hidden)))
        room = [hidden.new_empty(size, weight.shape[0], dtype=d) for d in (dtype, torch.float32)]  # one for all chunks
        for start in range(0, max(len(hidden), 1), size):  # once too where nothing is scored, for `kept`
            part = slice(start, start + size)
            x = hidden[part].to(dtype)
            raw, log_p = (r[: len(x)] for r in room)
            raw = torch.mm(x, w.t(), out=raw) if b is None else torch.addmm(b, x, w.t(), out=raw)
            raw.requires_grad_(any(needs))
            with torch.set_grad_enabled(any(needs)):
                logits = finish(raw.clone() if does.writes else raw)
            if kept is not None:
                kept.add(part, logits.detach(), targets[part])
            log_p = log_p[:, : logits.shape[1]]  # some leave out words that only pad the vocabulary
            torch.log_softmax(logits.detach(), -1, dtype=torch.float32, out=log_p)
            here = targets[part].unsqueeze(1)
            loss -= log_p.gather(1, here).sum()
            if not any(needs):
                continue
            # softmax minus one-hot, in place: of a plain head's chunk there are never more than two copies
            d_logits = log_p.exp_().scatter_add_(1, here, log_p.new_full(here.shape, -1.0))
            if does.keeps:
                d_raw = d_logits if raw.dtype == d_logits.dtype else raw.detach().copy_(d_logits)
            else:
                (d_raw,) = torch.autograd.grad(logits, raw, d_logits.to(logits.dtype))
            if needs[0]:
                d_hidden[part] = d_raw @ w
            if needs[1] and d_weight is None:
                d_weight = (d_raw.t() @ x).to(weight.dtype)
            elif needs[1] and dtype == weight.dtype:
                d_weight.addmm_(d_raw.t(), x)
            elif needs[1]:
                d_weight += d_raw.t() @ x
            if needs[2]:
                d_bias += d_raw.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.used = False
        return loss

    @staticmethod
    def backward(ctx, grad):
        # In place: at a large vocabulary one more copy of the head's gradient would be the peak.
        _check_once(ctx)
        return *(None if d is None else d.mul_(grad) for d in ctx.saved_tensors), None, None, None, None, None
