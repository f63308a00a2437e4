"""Masked next token prediction at full speed: the stock loss, with logits only where something is scored.

MNTP (BehnamGhader et al., "LLM2Vec", 2024, https://arxiv.org/abs/2404.05961) scores a fifth of all positions. Stock causal
heads compute logits, their softmax and their gradient for every position. `apply_mntp_head` changes the class of the
`*ForCausalLM` instance. Its forward runs the class's own forward on a view of the model, a shallow copy in which the
output head is replaced by one that takes only the rows that are scored.

    hidden (batch, length, width) -> rows where the next label is not -100 (n, width) -> logits (n, vocab) -> loss ()

Where the loss is the stock cross-entropy, only one chunk of the n rows has logits at a time: see loss.py.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.labels import unwatch_labels
from ..attention.model_forward import named_arguments
from ..errors import HeadError
from ..model.facts import parameter_names
from ..patch import enable_with_sinks_found
from ..swap.apply import apply, prepare
from ..swap.classes import Swapped, has_mixin, set_forward
from ..swap.record import Plan, record_of, settings_of
from ..swap.recording import is_transformed
from .causal_lm import build_around, check_causal, check_module, find_causal, vocabulary_size
from .eval_logits import EVAL_LOGITS, EvalLogits, KeptLogits
from .inputs import check_items, check_sequences, check_targets, checked_ignore_index, checked_labels
from .strategies import Forward, Scored, choose, stock

Model = TypeVar("Model", bound=nn.Module)


def apply_mntp_head(model: nn.Module, *, eval_logits: EvalLogits = "full") -> Any:
    """Make `model` bidirectional and give it the stock causal loss at the cost of the scored positions alone.

    Sink tokens that `enable_bidirectional` has given it stay.

    With `labels`, (batch, length), int64, -100 where nothing is scored, the model returns the loss of `LlamaForCausalLM`:
    the output at position i - 1 predicts the label at i. Its gradients can be taken once. Where nothing is scored, loss and
    gradients are 0 in training. In evaluation the loss is NaN there, as the stock one is: newer Trainers leave it out of the
    mean over batches, and with older ones (5.2 and before) the mean is NaN. `num_items_in_batch` and `ignore_index` are those of
    transformers. A `model.loss_function` or a forward of your own may read any logits: it is kept, at the stock cost.
    `outputs.logits` is None in training and what `eval_logits` says in evaluation; `skip_logits=True` or `False` in a call
    overrides that, as in Liger-Kernel. Without labels it is the stock logits.

    Args:
        model: a `*ForCausalLM` or a wrapper of one (PEFT, your own module), changed in place and returned. Or a bare `*Model`,
            or PEFT over one, which is returned inside its `*ForCausalLM`: the same backbone object, with a head that is tied
            to the input embeddings where the config ties them, and new otherwise. A further call only sets `eval_logits`.
        eval_logits: "full": (batch, length, vocab), detached, the stock values where position i predicts a scored label i + 1
            and 0 elsewhere, for a stock `compute_metrics`. "argmax": (batch, length), int64, the predicted token ids, -100
            where nothing is scored; only one chunk of logits is in memory. "scores": (batch, length, 2), float32, the predicted
            token ids and the loss of each scored token in nats, 0 elsewhere. `mntp_metrics` reads all three.

    Returns:
        `model`, or the `*ForCausalLM` around a bare model.

    Raises:
        HeadError: there is no causal language model whose loss shifts by one. Nothing is changed, here and below.
        UnsupportedModelError: as `enable_bidirectional` does, and its other errors.

    Example:
        >>> import torch, transformers, bidirect_patch
        >>> config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = bidirect_patch.apply_mntp_head(transformers.LlamaForCausalLM(config))
        >>> out = model(input_ids=torch.tensor([[3, 0, 5]]), labels=torch.tensor([[-100, 4, -100]]))
        >>> out.loss.shape, bidirect_patch.is_bidirectional(model)
        (torch.Size([]), True)
    """
    if eval_logits not in EVAL_LOGITS:
        raise HeadError(f'eval_logits must be "full", "argmax" or "scores", got {eval_logits!r}')
    causal = find_causal(model)
    if causal is None:
        model = causal = build_around(model)
    else:
        check_causal(causal)
    plans = [(causal, Plan(MNTPHead, HeadSettings(eval_logits)))]
    prepare(plans)  # raises what `apply` would, before anything is changed
    before = _patch_of(model)
    enable_with_sinks_found(model)
    try:
        apply(plans)  # prepared again: enabling may have changed the same instance
    except BaseException:
        apply(remove=_patch_of(model) - before)
        unwatch_labels(model.modules())
        raise
    return model


def remove_mntp_head(model: Model) -> Model:
    """The way back from `apply_mntp_head`, in place. Idempotent.

    Only the loss is the stock code again; `disable_bidirectional` does that for the attention.

    Args:
        model: any module. A model that `apply_mntp_head` built around a bare one stays around it.

    Returns:
        `model`.

    Raises:
        HeadError: `model` is no module.
        ForeignWrapperError: another tool changed the class after `apply_mntp_head`.
        OrderError: another tool's wrapper around the forward can't be followed.
    """
    check_module(model)
    apply(remove=[(module, MNTPHead) for module in model.modules() if has_mixin(module, MNTPHead)])
    return model


def _patch_of(model: nn.Module) -> set[tuple[nn.Module, type[Swapped]]]:
    """Each module with a patch, and each mixin that it has."""
    records = [(module, record_of(module)) for module in model.modules()]
    return {(module, plan.mixin) for module, record in records if record is not None for plan in record.plans}


@dataclass(frozen=True)
class HeadSettings:
    """What the forward of an MNTP head reads."""

    eval_logits: EvalLogits


class MNTPHead(Swapped):
    """A `*ForCausalLM` that computes logits only where the next label is scored."""

    rank = 20
    note = "MNTP head"

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""
        names = parameter_names(original)

        def forward(inner: Forward, self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs = named_arguments(original, names, args, kwargs)
            skip_logits = kwargs.pop("skip_logits", None)
            if not isinstance(skip_logits, (bool, type(None))):
                raise HeadError(f"skip_logits must be True, False or None, got {skip_logits!r}")
            check_sequences(self, kwargs)
            if kwargs.get("labels") is None or kwargs.get("shift_labels") is not None:
                return inner(self, **kwargs)
            return _scored_forward(self, inner, self.training if skip_logits is None else skip_logits, **kwargs)

        set_forward(cls, forward, below)


def _scored_forward(
    model: Any, inner: Forward, skip_logits: bool, labels: Any, return_dict: bool | None = None, **kwargs: Any
) -> Any:
    if return_dict is None:
        return_dict = model.config.return_dict
    labels = checked_labels(labels, kwargs)
    ignored = checked_ignore_index(kwargs)
    if is_transformed():
        return _forward_of_many(model, inner, labels, ignored, {**kwargs, "return_dict": return_dict})
    targets = F.pad(labels[:, 1:], (0, 1), value=ignored).flatten()
    rows = (targets != ignored).nonzero().squeeze(1)  # (n,)
    targets = targets[rows]
    compute = choose(model, kwargs)
    if compute is not stock:  # a loss of one's own may give all of these another meaning
        check_items(kwargs.get("num_items_in_batch"))
        check_targets(targets, vocabulary_size(model))
    settings = settings_of(model, HeadSettings)
    assert settings is not None  # the class is MNTPHead's
    kept = None if skip_logits else KeptLogits(settings.eval_logits, labels.shape, rows)
    loss, out = compute(model, inner, Scored(labels, rows, targets, kept), {**kwargs, "return_dict": True})
    out = replace(out, loss=loss, logits=None if kept is None else kept.logits)  # an output can't be emptied in place
    return out if return_dict else out.to_tuple()


def _forward_of_many(model: Any, inner: Forward, labels: Tensor, ignored: int, kwargs: dict[str, Any]) -> Any:
    """The stock forward, for per-sample gradients: which rows are scored differs from sample to sample there.

    In training, a sample of which nothing is scored has loss 0, as elsewhere: it is given a label, and the loss is dropped.
    """
    if not model.training:
        return inner(model, labels=labels, **kwargs)
    is_scored = (labels[:, 1:] != ignored).any()
    is_second = torch.arange(labels.shape[1], device=labels.device) == 1
    out = inner(model, labels=torch.where(is_scored | ~is_second, labels, 0), **kwargs)
    if isinstance(out, tuple):
        return out[0] * is_scored, *out[1:]
    return replace(out, loss=out.loss * is_scored)
