"""Four ways to compute the loss of a `*ForCausalLM` on the scored positions, and which of them a model allows.

Each runs the class's own forward, as it is or on a view of the model, so that soft-capping, logit scaling and auxiliary losses
are the class's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HeadError
from ..model.config import text_config
from ..swap.classes import original
from ..swap.recording import values_are_unknown
from ..swap.view import view
from . import loss as linear_loss
from .causal_lm import decoder_slot, head_slot
from .views import RunOnce, StandIn

try:
    from transformers.loss.loss_utils import ForCausalLMLoss as _stock_loss
except ImportError:  # before 4.46 the stock loss is written out in each forward
    _stock_loss = None

Forward = Callable[..., Any]  # called as forward(model_or_view, **kwargs)


@dataclass(frozen=True)
class Scored:
    """What of a batch is scored."""

    labels: Tensor  # (batch, length), int64
    rows: Tensor  # (n,), int64: among the batch * length outputs, those that are scored
    targets: Tensor  # (n,), int64: the label of each
    sink: linear_loss.LogitsSink | None  # what takes the logits for evaluation


Strategy = Callable[[Any, Forward, Scored, dict[str, Any]], tuple[Tensor, Any]]  # -> the loss, and the output of the forward


def choose(model: Any, kwargs: dict[str, Any]) -> Strategy:
    """The cheapest way that gives the model's own loss."""
    if _has_own_loss(model):
        return stock
    if _adds_router_loss(model, kwargs):
        return with_routers
    return chunked if _may_be_chunked(model) else at_once


def stock(model: Any, inner: Forward, scored: Scored, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Everything as it is: nobody knows which logits a loss of unknown kind reads."""
    out = inner(model, labels=scored.labels, **kwargs)
    if scored.sink is not None:
        logits = out.logits.flatten(0, 1)[scored.rows.to(out.logits.device)]
        scored.sink.add(slice(None), logits.detach(), scored.targets)
    return out.loss, out


def at_once(model: Any, inner: Forward, scored: Scored, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The stock cross-entropy of all scored rows as one short sequence, (1, n)."""
    items = kwargs.pop("num_items_in_batch", None)
    out = inner(_rows_view(model, scored.rows), **kwargs)
    if out.logits.shape[:2] != (1, scored.rows.shape[0]):
        raise HeadError(f"{type(model).__name__}.forward makes its logits without calling its output head")
    logits = out.logits[0]
    targets = scored.targets.to(logits.device)
    if scored.sink is not None:
        scored.sink.add(slice(None), logits.detach(), targets)
    return _per_item(F.cross_entropy(logits.float(), targets, reduction="sum"), items, targets, model.training), out


def with_routers(model: Any, inner: Forward, scored: Scored, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """All scored rows as one short sequence, (1, n + 1), through the class's own shift and loss, which adds its routers'."""
    # The shift drops the first label and the last row, so one of each is added to be dropped.
    labels = F.pad(scored.targets, (1, 0), value=kwargs.get("ignore_index", -100))[None]
    out = inner(_rows_view(model, F.pad(scored.rows, (0, 1))), labels=labels, **kwargs)
    if scored.sink is not None:
        scored.sink.add(slice(None), out.logits[0, :-1].detach(), scored.targets)
    items = kwargs.get("num_items_in_batch")
    if model.training and scored.targets.numel() == 0 and (items is None or items == 0):  # a mean over nothing would be NaN
        return out.logits.float().sum() * 0.0, out
    return out.loss, out


def chunked(model: Any, inner: Forward, scored: Scored, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The stock cross-entropy, one chunk of rows at a time; `inner` turns the head's output into logits for each."""
    slot, decoder = head_slot(model), decoder_slot(model)
    lm_head = model._modules[slot]
    backbone = RunOnce(model._modules[decoder], [])
    captured: list[tuple[Tensor, _Autocast]] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append((hidden, _Autocast.now(hidden)))
        return hidden.new_zeros(1, 1, lm_head.out_features)

    without_num_items = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    out = inner(view(model, {decoder: backbone, slot: StandIn(lm_head, capture)}), **without_num_items)
    if not captured:
        raise HeadError(f"{type(model).__name__}.forward makes its logits without calling its output head, {slot!r}")
    outputs, autocast = captured[0]
    with autocast.again():
        if linear_loss.matmul_dtype(lm_head.weight) == torch.float16:
            # A gradient taken before the loss is scaled up would vanish.
            return at_once(view(model, {decoder: backbone}), inner, scored, kwargs)
        hidden = outputs.flatten(0, 1)[scored.rows.to(outputs.device)]  # (n, width)
        targets = scored.targets.to(hidden.device)

        def finish(raw: Tensor) -> Tensor:
            """What the class does to the output of its head: scaling, soft-capping, float()."""
            ready = view(model, {decoder: backbone, slot: StandIn(lm_head, lambda _: raw[None])})
            return inner(ready, **without_num_items).logits[0]

        loss = linear_loss.total(hidden, lm_head.weight, lm_head.bias, targets, finish, scored.sink)
    return _per_item(loss, kwargs.get("num_items_in_batch"), targets, model.training), out


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast. A wrapper around the class's forward, as accelerate's, may set another than there is here."""

    kind: str  # of device
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, tensor: Tensor) -> "_Autocast":
        kind = tensor.device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> AbstractContextManager[Any]:
        is_here = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)
        if is_here == (self.enabled, self.dtype):
            return nullcontext()
        return torch.autocast(self.kind, self.dtype, self.enabled)


def _rows_view(model: Any, rows: Tensor) -> Any:
    """`model` as it is, with logits (1, n, vocab) of the given rows alone."""
    slot = head_slot(model)
    lm_head = model._modules[slot]

    def some(hidden: Tensor) -> Tensor:
        return lm_head(hidden.flatten(0, 1)[rows.to(hidden.device)][None])

    return view(model, {slot: StandIn(lm_head, some)})


def _per_item(total: Tensor, items: Any, targets: Tensor, is_training: bool) -> Tensor:
    """A sum over `targets`, divided as the stock loss divides it.

    Where nothing is scored, here or in the whole step, it is 0 in training, and NaN in evaluation: a 0 would lower the mean over
    batches.
    """
    if isinstance(items, Tensor):
        return total / (torch.where(items == 0, 1, items) if is_training else items).to(total.device)
    if items is None:
        return total / (max(targets.numel(), 1) if is_training else targets.numel())
    return total / (items or 1 if is_training else items)


def _has_own_loss(model: Any) -> bool:
    """Whether the loss may be anything: somebody's loss_function, or a forward that is not transformers' own."""
    loss = getattr(model, "loss_function", _stock_loss)
    cls: Any = original(type(model))
    return not _is_of_a_family(cls.forward) or (loss is not _stock_loss and not _is_of_a_family(loss))


def _is_of_a_family(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.models.")


def _adds_router_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    routers = kwargs.get("output_router_logits")
    return bool(getattr(text_config(model.config), "output_router_logits", False) if routers is None else routers)


def _may_be_chunked(model: Any) -> bool:
    """Whether the head is a plain linear layer, whose product and gradient may be taken piece by piece."""
    lm_head = model._modules[head_slot(model)]
    return (
        not values_are_unknown()  # torch.compile fuses by itself, and no graph can hold a gradient inside a forward
        and type(lm_head) is nn.Linear
        and type(lm_head.weight) in (Tensor, nn.Parameter)  # no DTensor
        and not any(value for name, value in vars(lm_head).items() if name.endswith("_hooks"))
        and "forward" not in vars(lm_head)
        and decoder_slot(model) != ""
    )
