"""Masked next token prediction at full speed: the stock loss, with logits only where something is scored.

MNTP scores a fifth of all positions, and stock causal heads compute logits, their softmax and their gradient for every
one. `apply_mntp_head` swaps the class of the `*ForCausalLM` instance. Its forward runs the class's own forward on a
view of the model, a shallow copy in which the language-model head is replaced: that hands on only the rows that are
scored. Soft-capping, logit scaling and auxiliary losses are the class's own, whatever the family; nothing of any forward
is copied here.

    hidden (batch, seq, width) -> rows where the next label is not -100 (n, width) -> logits (n, vocab) -> loss ()

Where the loss is the stock cross-entropy, never more than a chunk of the n rows has logits: see linear_loss.py.
"""

import inspect
import logging
from dataclasses import replace
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..mntp import loss as linear_loss
from ..errors import AttentionMaskError, HeadError
from ..model.find import forwards, parameter_names
from ..attention.forward import BidirectionalModel, given_input, rebound_forward, text_config
from ..attention.masks import read_layout
from ..patch import enable_bidirectional
from ..swap.swap import Swapped, is_swapped, original, restore, subclass, swap

try:
    from transformers.loss.loss_utils import ForCausalLMLoss as _stock_loss
except ImportError:  # before 4.46 the stock loss is written out in each forward
    _stock_loss = None

_log = logging.getLogger(__name__)


def apply_mntp_head(model: nn.Module, *, eval_logits: Literal["full", "argmax", "scores"] = "full") -> Any:
    """Make `model` bidirectional and give it the stock causal loss at the price of the positions that are scored.

    model: a `*ForCausalLM` or a wrapper of one (PEFT, your own module), changed in place and returned; or a bare
        `*Model`, or PEFT over one, which is returned inside its `*ForCausalLM`: the same backbone object, its head tied
        to the input embeddings where the config ties them and new otherwise. A further call only sets `eval_logits`.
    eval_logits: what `outputs.logits` holds in evaluation, see below.

    Called with `labels` (batch, seq), int64, -100 where not scored, the model returns the loss of `LlamaForCausalLM`'s
    shift, position i predicted from i-1, with the stock gradients, which can be taken once; 0 with zero gradients where
    nothing is scored, and a 0 it is in `Trainer`'s mean over batches too: take "scores" where texts are that short.
    `num_items_in_batch` and `ignore_index` mean what they mean there. With a `model.loss_function` or a forward of your own,
    which may read any logits, the loss is theirs, at the stock cost. `outputs.logits`:

    - without labels: the stock logits. That is how `Trainer` smooths labels, at the stock cost.
    - with labels, training: None.
    - with labels, evaluation, "full": (batch, seq, vocab), detached, the stock values where position i predicts a
      scored label i+1 and 0 elsewhere, so that `Trainer.evaluate` and a stock `compute_metrics` work unchanged.
    - with labels, evaluation, "argmax": (batch, seq), int64, the predicted token ids, -100 where not scored: memory
      stays bounded by one chunk, and `compute_metrics` gets them as predictions.
    - with labels, evaluation, "scores": (batch, seq, 2), float32, the predicted token ids and the loss of each scored
      token in nats, 0 where not scored: as small, and sums that don't depend on how texts were batched (those over the
      scored labels: `Trainer` pads one batch to another's length with -100).
    - `skip_logits=True` or `False` in a call overrides the first two, as in Liger-Kernel.

    Raises HeadError if the model is or has no causal language model, UnsupportedModelError as `enable_bidirectional`
    does; nothing is changed then.
    """
    if eval_logits not in ("full", "argmax", "scores"):
        raise HeadError(f'eval_logits must be "full", "argmax" or "scores", got {eval_logits!r}')
    causal = _find_causal(model)
    if causal is None:
        model = causal = _build_around(model)
    _head_slot(causal)
    names = _names(type(causal))
    tensor_parallel = getattr(causal.config, "pretraining_tp", 1)
    if tensor_parallel > 1 and "pretraining_tp" in names:
        raise HeadError(
            f"with pretraining_tp={tensor_parallel} {type(causal).__name__} slices its output head instead of calling it: set "
            "model.config.pretraining_tp = 1, which computes the same"
        )
    # The decoders of encoder-decoders (Bart, Whisper) have a loss that doesn't shift.
    if not any(name == "loss_function" or "shift" in name for name in names):
        raise HeadError(
            f"{type(causal).__name__} scores labels where they stand, without the shift by one that MNTP is trained "
            "with: use a decoder-only *ForCausalLM"
        )
    attributes = {"_bidirect_patch_eval_logits": eval_logits}
    if not is_swapped(causal, MNTPHead):
        attributes.update(rebound_forward(causal, subclass(type(causal), MNTPHead)))
    enable_bidirectional(model)
    if is_swapped(causal, MNTPHead):
        causal.__dict__.update(attributes)
    else:
        swap(causal, MNTPHead, attributes)
    return model


def remove_mntp_head(model: nn.Module) -> nn.Module:
    """The way back from `apply_mntp_head`, in place; returns `model`. Idempotent.

    Only the loss goes back to the stock code; `disable_bidirectional` does that for the attention.
    Raises ForeignWrapperError if another tool swapped the class after us.
    """
    for module in model.modules():
        if is_swapped(module, MNTPHead):
            restore(module, MNTPHead)
    return model


class MNTPHead(Swapped):
    """A `*ForCausalLM` that computes logits only where the next label is scored."""

    record = "_bidirect_patch_head_record"
    _bidirect_patch_eval_logits: str

    @classmethod
    def __init_mixed__(cls, original: type) -> None:
        inner = original.forward  # type: ignore[attr-defined]
        names = parameter_names(original)

        @wraps(inner)  # Trainer reads the signature
        def forward(self, *args, **kwargs):
            kwargs = {**dict(zip(names, args)), **kwargs}
            skip_logits = kwargs.pop("skip_logits", None)
            _check_documents(self, kwargs)
            if kwargs.get("labels") is None or kwargs.get("shift_labels") is not None:
                return inner(self, **kwargs)
            return _scored_forward(self, inner, self.training if skip_logits is None else skip_logits, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]


def _scored_forward(model: Any, inner: Any, skip_logits: bool, labels: Tensor, return_dict=None, **kwargs: Any) -> Any:
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    labels = _checked_labels(labels, kwargs)
    ignore = kwargs.get("ignore_index", -100)
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore).flatten()
    rows = (targets != ignore).nonzero().squeeze(1)  # (n,)
    targets = targets[rows]
    kept = None if skip_logits else _Kept(model._bidirect_patch_eval_logits, labels.shape, rows)
    if _has_own_loss(model, inner):
        kwargs["labels"], compute = labels, _stock
    elif _adds_router_loss(model, kwargs):
        compute = _with_routers
    else:
        compute = _chunked if _may_be_chunked(model) else _at_once
    loss, out = compute(model, inner, rows, targets, kept, {**kwargs, "return_dict": True})
    out = replace(out, loss=loss, logits=None if kept is None else kept.logits)  # an output can't be emptied in place
    return out if return_dict else out.to_tuple()


def _checked_labels(labels: Any, kwargs: dict[str, Any]) -> Tensor:
    """Rows are picked by their place, so that labels of another shape would score the wrong ones without a word."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise HeadError(f"labels must be a tensor of token ids, int64, got {getattr(labels, 'dtype', type(labels).__name__)}")
    given = given_input(kwargs)
    if given is not None and labels.shape != given.shape[:2]:
        raise HeadError(
            f"labels of shape {tuple(labels.shape)} for input of {given.shape[0]} x {given.shape[1]} tokens: give one "
            "label a token, -100 where none is scored"
        )
    keep = kwargs.get("logits_to_keep", kwargs.get("num_logits_to_keep"))
    if isinstance(keep, Tensor) or keep:
        raise HeadError("logits_to_keep beside labels: the loss takes every scored position, so leave it out")
    return labels.long()


def _check_documents(model: Any, kwargs: dict[str, Any]) -> None:
    """A few models (Bloom, MPT) take position_ids among **kwargs and drop them, so that no mask would know of documents."""
    positions, given = kwargs.get("position_ids"), given_input(kwargs)
    if positions is None or given is None:
        return
    decoder = next((m for m in model.modules() if is_swapped(m, BidirectionalModel)), None)  # PEFT may be around it
    if decoder is None or "position_ids" in parameter_names(original(type(decoder))):
        return
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 4) != 2:
        return  # which says itself who attends to whom
    document = read_layout(mask, positions, None, given.shape[0], given.shape[1], given.device).document
    if document is not None and document.any():
        raise AttentionMaskError(
            f"{type(model).__name__} takes no position_ids, so packed documents can't be told apart: pass one document a row, "
            "with padding"
        )


def _has_own_loss(model: Any, inner: Any) -> bool:
    """Whether the loss may be anything: somebody's loss_function, or a forward that isn't transformers' own."""
    loss = getattr(model, "loss_function", _stock_loss)
    return not _is_of_a_family(inner) or (loss is not _stock_loss and not _is_of_a_family(loss))


def _is_of_a_family(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.models.")


def _stock(
    model: Any, inner: Any, rows: Tensor, targets: Tensor, kept: "_Kept | None", kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """All as it is: which logits a loss of unknown kind reads, nobody knows."""
    out = inner(model, **kwargs)
    if kept is not None:
        kept.add(slice(None), out.logits.flatten(0, 1)[rows.to(out.logits.device)], targets)
    return out.loss, out


def _at_once(
    model: Any, inner: Any, rows: Tensor, targets: Tensor, kept: "_Kept | None", kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """The stock cross-entropy of all scored rows as one short sequence, (1, n)."""
    items = kwargs.pop("num_items_in_batch", None)
    out = inner(_rows_view(model, rows), **kwargs)
    if out.logits.shape[:2] != (1, rows.shape[0]):
        raise HeadError(f"{type(model).__name__}.forward makes its logits without calling its output head")
    logits = out.logits[0]
    targets = targets.to(logits.device)
    if kept is not None:
        kept.add(slice(None), logits, targets)
    return _per_item(F.cross_entropy(logits.float(), targets, reduction="sum"), items, targets), out


def _with_routers(
    model: Any, inner: Any, rows: Tensor, targets: Tensor, kept: "_Kept | None", kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """All scored rows as one short sequence, (1, n + 1), through the class's own shift and loss: it adds its routers'."""
    # The shift drops the first label and the last row, so one of each is put there to be dropped.
    labels = F.pad(targets, (1, 0), value=kwargs.get("ignore_index", -100))[None]
    out = inner(_rows_view(model, F.pad(rows, (0, 1))), labels=labels, **kwargs)
    if kept is not None:
        kept.add(slice(None), out.logits[0, :-1], targets)
    items = kwargs.get("num_items_in_batch")
    if targets.numel() == 0 and (items is None or items == 0):  # a mean over nothing would be NaN
        return out.logits.float().sum() * 0.0, out
    return out.loss, out


def _rows_view(model: Any, rows: Tensor) -> Any:
    """`model` as it is, with logits (1, n, vocab) of the given rows alone."""
    slot = _head_slot(model)
    lm_head = model._modules[slot]

    def some(hidden: Tensor) -> Tensor:
        return lm_head(hidden.flatten(0, 1)[rows.to(hidden.device)][None])

    return _view(model, {slot: _StandIn(lm_head, some)})


def _chunked(
    model: Any, inner: Any, rows: Tensor, targets: Tensor, kept: "_Kept | None", kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """The stock cross-entropy, a chunk of rows at a time; `inner` makes logits of what the head gave for each."""
    items = kwargs.pop("num_items_in_batch", None)
    slot, decoder = _head_slot(model), _decoder_slot(model)
    lm_head = model._modules[slot]
    backbone = _RunOnce(model._modules[decoder], [])
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden.new_zeros(1, 1, lm_head.out_features)

    view = _view(model, {decoder: backbone, slot: _StandIn(lm_head, capture)})
    out = inner(view, **kwargs)
    if not captured:
        raise HeadError(f"{type(model).__name__}.forward makes its logits without calling its output head, {slot!r}")
    hidden = captured[0].flatten(0, 1)
    hidden, targets = hidden[rows.to(hidden.device)], targets.to(hidden.device)  # (n, width), (n,)

    def finish(raw: Tensor) -> Tensor:
        """What this family does to its head's output: scaling, soft-capping, float()."""
        ready = _view(model, {decoder: backbone, slot: _StandIn(lm_head, lambda _: raw[None])})
        return inner(ready, **kwargs).logits[0]

    loss = linear_loss.total(hidden, lm_head.weight, lm_head.bias, targets, finish, kept)
    return _per_item(loss, items, targets), out


def _per_item(total: Tensor, items: Any, targets: Tensor) -> Tensor:
    """A sum over `targets`, divided as the stock loss divides it; 0 where nothing is scored, here or in the whole step."""
    if isinstance(items, Tensor):
        return total / torch.where(items == 0, 1, items).to(total.device)
    return total / (max(targets.numel(), 1) if items is None else items or 1)


class _Kept:
    """Collects what evaluation is to see of the logits: all of them, the token that each predicts, or its loss too."""

    def __init__(self, what: str, shape: torch.Size, rows: Tensor) -> None:
        self.what, self.shape, self.rows = what, shape, rows
        self.flat: Tensor | None = None

    def add(self, part: slice, logits: Tensor, targets: Tensor) -> None:
        """logits: (n, vocab). targets: (n,)."""
        values = logits.detach() if self.what == "full" else logits.argmax(-1)
        if self.what == "scores":
            losses = F.cross_entropy(logits.detach().float(), targets.to(logits.device), reduction="none")
            values = torch.stack([values.float(), losses], -1)
        if self.flat is None:
            fill = -100 if self.what == "argmax" else 0
            self.flat = values.new_full((self.shape.numel(), *values.shape[1:]), fill)
        self.flat[self.rows[part].to(values.device)] = values

    @property
    def logits(self) -> Tensor | None:
        return None if self.flat is None else self.flat.view(*self.shape, *self.flat.shape[1:])


class _StandIn:
    """Stands in a submodule's place in a view: calls go to `call`, all else to the submodule."""

    def __init__(self, module: nn.Module, call: Any) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _RunOnce:
    """Stands in the backbone's place: the first call runs it, or the model in it, and the next repeat that."""

    def __init__(self, module: nn.Module, outputs: list[Any]) -> None:
        self.module, self.outputs = module, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.outputs:
            self.outputs.append(self.module(*args, **kwargs))
        return self.outputs[0]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return _RunOnce(value, self.outputs) if isinstance(value, PreTrainedModel) else value


def _view(model: nn.Module, replaced: dict[str, Any]) -> Any:
    """A shallow copy of `model` with other objects in place of some submodules; `model` itself is never touched."""
    view = object.__new__(type(model))
    view.__dict__ = {**model.__dict__, "_modules": {**model._modules, **replaced}}
    return view


def _adds_router_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    routers = kwargs.get("output_router_logits")
    return bool(getattr(text_config(model.config), "output_router_logits", False) if routers is None else routers)


def _may_be_chunked(model: Any) -> bool:
    """Whether the head is a plain linear layer, whose product and gradient may be taken piece by piece."""
    lm_head = model._modules[_head_slot(model)]
    return (
        not torch.compiler.is_compiling()  # which fuses by itself, and can't trace a gradient inside a forward
        and type(lm_head) is nn.Linear
        and type(lm_head.weight) in (Tensor, nn.Parameter)  # no DTensor
        and not any(value for name, value in vars(lm_head).items() if name.endswith("_hooks"))
        and "forward" not in vars(lm_head)
        and _decoder_slot(model) != ""
        # where a gradient taken before the loss is scaled up would vanish
        and linear_loss.matmul_dtype(lm_head.weight) != torch.float16
    )


def _find_causal(model: Any) -> PreTrainedModel | None:
    """The first model in `model` that has an output head and a loss."""
    if not isinstance(model, nn.Module):
        raise HeadError(f"expected a torch.nn.Module, got {type(model).__name__}: load the model and pass the object")
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            if _takes_labels(type(module)):
                return module
    return None


def _takes_labels(cls: type) -> bool:
    return "labels" in parameter_names(cls)


def _names(cls: type) -> set[str]:
    """The attributes and variables that the class's forward names."""
    codes = [inspect.unwrap(forward).__code__ for forward in forwards(cls)]
    return {name for code in codes for name in (*code.co_names, *code.co_varnames)}


def _head_slot(causal: PreTrainedModel) -> str:
    """The name under which `causal` holds its output head."""
    head = causal.get_output_embeddings()
    if isinstance(head, nn.ModuleList):
        raise HeadError(f"{type(causal).__name__} has {len(head)} output heads, and MNTP scores one: use a text model")
    for name, child in causal._modules.items():
        if child is head:
            return name
    raise HeadError(
        f"{type(causal).__name__} keeps its output head ({type(head).__name__}) inside another module, where it can't "
        "be handed the scored positions alone: use the stock loss with enable_bidirectional(model)"
    )


def _decoder_slot(causal: Any) -> str:
    """The name under which `causal` holds its decoder, or what holds that and a vision tower; "" if it holds it apart."""
    if causal.base_model_prefix in causal._modules:
        return causal.base_model_prefix
    embedding = causal.get_input_embeddings()
    for name, child in causal.named_children():
        if child is not embedding and any(module is embedding for module in child.modules()):
            return name
    return ""


def _build_around(model: nn.Module) -> PreTrainedModel:
    """The `*ForCausalLM` of a bare model's config, around `model` itself; no weight but a new head's is allocated."""
    bare = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if bare is None or not (bare is model or hasattr(model, "peft_config")):
        raise HeadError(
            f"{type(model).__name__} holds no causal language model with a loss: pass a *ForCausalLM, a bare *Model of "
            "one, or PEFT over either, before it is wrapped in anything else"
        )
    if type(bare.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HeadError(f"transformers knows no *ForCausalLM for {type(bare).__name__}: use a decoder-only model")
    with torch.device("meta"):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(bare.config)](bare.config)
    kinds = {type(child): name for name, child in causal.named_children()}
    slot = kinds.get(original(type(bare)), "")
    if not slot:
        raise HeadError(
            f"{type(bare).__name__} is not the backbone of {type(causal).__name__}: load a *ForCausalLM and pass that"
        )
    setattr(causal, slot, model)
    causal.training = model.training
    embedding = bare.get_input_embeddings().weight
    for name, child in causal.named_children():
        if name != slot:
            child.to_empty(device=embedding.device).to(embedding.dtype).train(model.training)
            child.apply(causal._init_weights)
    head = causal.get_output_embeddings()
    if getattr(text_config(bare.config), "tie_word_embeddings", False):
        head.weight = embedding
    else:
        names = type(bare).__name__, type(causal).__name__
        _log.warning("%s has no output head: that of its %s is new. Load the *ForCausalLM to keep one.", *names)
    return causal
