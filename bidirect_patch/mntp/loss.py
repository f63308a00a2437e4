"""The cross-entropy of a linear head's logits, summed over rows, with never more than one chunk of logits in memory.

On a GPU where Liger-Kernel is installed, its fused kernel computes it. Elsewhere the rows are taken in chunks here, and the
gradient of each chunk is taken at once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Logits of one chunk in float32. With fewer rows than some 200, a matrix product waits for memory.
CHUNK_BYTES = 108 * 2**20
LOWEST = -80.0  # below this logarithm a float32 has fewer digits

Finish = Callable[[Tensor], Tensor]  # what a model does to the logits (rows, vocab) of its head: scaling, soft-capping, a cast


class LogitsSink(Protocol):
    """What takes the logits of each chunk, for evaluation."""

    def add(self, part: slice, logits: Tensor, targets: Tensor) -> None:
        """Take one chunk.

        Args:
            part: which of the rows these are.
            logits: (rows, vocab), detached. They are overwritten later.
            targets: (rows,), int64.
        """


def total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, finish: Finish, sink: LogitsSink | None
) -> Tensor:
    """The sum of the cross-entropies in nats, (), float32. Its backward may run once.

    Args:
        hidden: (n, width), the inputs of the head.
        weight: (vocab, width), of the head.
        bias: (vocab,), of the head, or None.
        targets: (n,), int64.
        finish: what the model does to the head's logits, (rows, vocab) -> (rows, vocab or less).
        sink: gets the logits of each chunk; None where nobody needs them.
    """
    effect = _effect_of(finish, weight)
    # Liger gives the head no gradient where the rows need none, and takes one dtype for all.
    fits = effect.is_identity and sink is None and len(hidden) and hidden.requires_grad and hidden.dtype == weight.dtype
    fused = _liger() if fits and _on_gpu(hidden) else None
    if fused is None:
        how = _How(finish, effect, sink, torch.is_grad_enabled())
        return _ChunkedLoss.apply(hidden, weight, bias, targets, how)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        return _Once.apply(fused(weight, hidden, targets, bias))


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with `weight`: that of autocast, or its own."""
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


class _Effect(NamedTuple):
    """What `finish` does to the logits that it gets."""

    is_identity: bool  # it returns them unchanged
    writes: bool  # it changes them in place


def _effect_of(finish: Finish, weight: Tensor) -> _Effect:
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version
        raw = weight.new_zeros(1, weight.shape[0], dtype=matmul_dtype(weight))
        version = raw._version
        out = finish(raw)
        writes = raw._version != version
        same = (out.data_ptr(), out.shape, out.dtype) == (raw.data_ptr(), raw.shape, raw.dtype)
    return _Effect(same and not writes, writes)


class _How(NamedTuple):
    """What `_ChunkedLoss` gets beside tensors."""

    finish: Finish
    effect: _Effect
    sink: LogitsSink | None
    with_grad: bool


def _check_once(ctx: Any) -> None:
    """Gradients that the forward made, and that are scaled in place, can be taken once."""
    if torch.is_grad_enabled() or ctx.used:
        raise RuntimeError(
            "the loss of apply_mntp_head has one backward, which takes the gradients that its forward made: for a second "
            "one, or for create_graph=True, use the stock loss (bidirect_patch.head.remove_mntp_head)"
        )
    ctx.used = True


class _Once(torch.autograd.Function):
    """A loss as it is, whose backward may run once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        ctx.used = False
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _check_once(ctx)
        return grad


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `finish(hidden @ weight.T + bias)`, with its gradient taken in the forward.

    hidden: (n, width). weight: (vocab, width). bias: (vocab,) or None. targets: (n,), int64.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How) -> Tensor:
        needs = [how.with_grad and needed for needed in ctx.needs_input_grad[:3]]
        dtype = matmul_dtype(weight)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        grads = _Gradients(hidden, weight, bias, needs)
        loss = torch.zeros((), device=hidden.device)
        size = max(1, min(CHUNK_BYTES // (4 * weight.shape[0]), len(hidden)))
        room = [hidden.new_empty(size, weight.shape[0], dtype=d) for d in (dtype, torch.float32)]  # one for all chunks
        for start in range(0, max(len(hidden), 1), size):  # once too where nothing is scored, for the sink
            part = slice(start, start + size)
            x = hidden[part].to(dtype)
            raw, p = (r[: len(x)] for r in room)
            raw = torch.mm(x, w.t(), out=raw) if b is None else torch.addmm(b, x, w.t(), out=raw)
            raw.requires_grad_(any(needs))
            with torch.set_grad_enabled(any(needs)):
                logits = how.finish(raw.clone() if how.effect.writes else raw)
            if how.sink is not None:
                how.sink.add(part, logits.detach(), targets[part])
            p = p[:, : logits.shape[1]]  # some models leave out ids that only pad the vocabulary
            torch.softmax(logits.detach(), -1, dtype=torch.float32, out=p)
            here = targets[part].unsqueeze(1)
            loss -= _log_probabilities(p, logits.detach(), here).sum()
            if any(needs):
                # Softmax minus one-hot, in place: of a plain head's chunk there are never more than two copies.
                d_logits = p.scatter_add_(1, here, p.new_full(here.shape, -1.0))
                grads.add(part, x, w, _before_finish(raw, logits, d_logits, how.effect))
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        ctx.used = False
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: with a large vocabulary, one more copy of the head's gradient would be the peak.
        _check_once(ctx)
        return *(None if d is None else d.mul_(grad) for d in ctx.saved_tensors), None, None


def _log_probabilities(p: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Logarithms of the targets' probabilities, (rows, 1), float32.

    Args:
        p: (rows, vocab), softmax of the logits in float32.
        logits: (rows, vocab).
        targets: (rows, 1), int64.
    """
    log_p = p.gather(1, targets).log()
    far = (log_p < LOWEST).flatten().nonzero().flatten()  # whose probability has lost its digits: seldom any
    apart = logits[far].float()
    log_p[far] = apart.gather(1, targets[far]) - apart.logsumexp(-1, keepdim=True)
    return log_p


def _before_finish(raw: Tensor, logits: Tensor, d_logits: Tensor, effect: _Effect) -> Tensor:
    """The gradient of `raw`, given that of `logits = finish(raw)`, both (rows, vocab). It may overwrite `raw`."""
    if not effect.is_identity:
        return torch.autograd.grad(logits, raw, d_logits.to(logits.dtype))[0]
    return d_logits if raw.dtype == d_logits.dtype else raw.detach().copy_(d_logits)


class _Gradients:
    """The gradients of `hidden`, `weight` and `bias`, summed over chunks; None for those that need none."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.needs_weight, self.dtype = needs[1], weight.dtype
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias) if needs[2] and bias is not None else None

    def add(self, part: slice, x: Tensor, w: Tensor, d_raw: Tensor) -> None:
        """Add one chunk.

        Args:
            part: which of the rows these are.
            x: (rows, width), the head's input in the dtype of the product.
            w: (vocab, width), the head's weight in that dtype.
            d_raw: (rows, vocab), the gradient of their product.
        """
        if self.hidden is not None:
            self.hidden[part] = d_raw @ w
        if self.bias is not None:
            self.bias += d_raw.sum(0)
        if not self.needs_weight:
            return
        if self.weight is None:
            self.weight = (d_raw.t() @ x).to(self.dtype)
        elif w.dtype == self.dtype:
            self.weight.addmm_(d_raw.t(), x)
        else:
            self.weight += d_raw.t() @ x
