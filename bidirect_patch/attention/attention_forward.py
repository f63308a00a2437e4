"""The patched forward of an attention module: its mask and arguments for its backend and span."""

from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionMaskError, OrderError, UnsupportedModelError
from ..model.config import backend_of, is_known_kernel, kernel_of
from ..model.facts import (
    CROSS_ATTENTION,
    adds_bias_by_key,
    bias_parameter,
    mask_parameter,
    parameter_names,
    takes_any_keyword,
)
from ..model.windows import Span
from ..swap import in_use
from ..swap.classes import Swapped, set_forward
from ..swap.modes import Mode
from ..swap.record import settings_of
from ..swap.recording import is_graph_captured
from ..swap.view import unpatched
from .dense import additive, dense_mask
from .flash import SinkRows, are_sequence_numbers, first_tokens, how_to_run, sequence_numbers
from .indexer_positions import MaskedPositions
from .mirror import mirrored_bias, mirrored_mask
from .mixed import check_attributes, check_model_above, is_run_again_in_its_model
from .module_settings import AttentionSettings
from .old_releases import upad_input
from .padding_and_packing import Sequences
from .ready_mask import pick
from .sinks_alone import cut_to_sinks, put_in


class BidirectionalAttention(Swapped):
    """An attention module, while it is bidirectional."""

    opens = True

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""
        call = _Call(original)

        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            settings = settings_of(self, AttentionSettings)
            if settings is None:  # another thread changed the mode meanwhile
                return inner(self, *args, **kwargs)
            check_attributes(self)
            if not is_graph_captured():
                if in_use.mode_now() is Mode.CAUSAL_BLOCK:  # a causal forward's backward pass runs it again
                    return unpatched(self).forward(*args, **kwargs)
                if in_use.is_run_again() and is_run_again_in_its_model(self):  # by a forward from before the patch
                    with in_use.attending(in_use.mode_now(), in_use.Noted(mask_is_ours=False)):
                        return forward(inner, self, *args, **kwargs)
                if not in_use.mask_is_ours():
                    check_model_above(self)
                settings = in_use.noted_settings(self) or settings
            args, kwargs, sinks = call.arguments(self, settings, args, kwargs)
            if not sinks:
                return inner(self, *args, **kwargs)
            alone = [inner(self, **cut) for cut in cut_to_sinks(call.names, args, kwargs, sinks)]
            return put_in(inner(self, *args, **kwargs), sinks, alone)

        set_forward(cls, forward, below)
        if hasattr(original, "_upad_input"):  # FlashAttention before 4.43: the only place that sets cu_seqlens
            cls._upad_input = upad_input  # type: ignore[attr-defined]  # as the original has it

    @classmethod
    def note_of(cls, module: Any) -> str:
        """See `Swapped.note_of`."""
        settings = settings_of(module, AttentionSettings)
        sinks = 0 if settings is None else settings.span.sinks
        if not sinks:
            return "bidirectional"
        sees = "" if settings is None or settings.span.sees_sinks else ", which the others don't see"
        return f"bidirectional but for {sinks} sink token{'s' * (sinks > 1)}{sees}"


class BidirectionalPart(Swapped):
    """A part of an attention module that holds a causal flag or a triangular buffer; its methods stay as they are."""

    note = "bidirectional"


class _Call:
    """How a class of attention modules is called, and with which arguments its forward is bidirectional."""

    def __init__(self, original: type) -> None:
        self.names = parameter_names(original)
        self.mask_name = mask_parameter(original)
        self.bias_name = bias_parameter(original)
        # Beside the mask, a matrix (n, n) that is 1 where the future is: CTRL until 5.2.
        self.future_name = "mask" if {"mask", "attention_mask"} <= set(self.names) else None
        self.adds_bias_by_key = adds_bias_by_key(original)
        self.takes_any_keyword = takes_any_keyword(original)
        self.plans_its_own_padding = hasattr(original, "_upad_input")

    def arguments(
        self, module: Any, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], SinkRows]:
        """The arguments with which the module's own forward is bidirectional, and the sinks that have to be run alone."""
        if any(self.given(args, kwargs, name) is not None for name in CROSS_ATTENTION):
            return args, kwargs, []  # attention to another sequence is not causal
        config = getattr(module, "config", settings.config)
        backend = backend_of(config)
        kernel = kernel_of(config)
        if not is_known_kernel(kernel, kernel_of(settings.config)):
            raise OrderError(
                f"the config of one {type(module).__name__} names attn_implementation={kernel!r}, with which nothing was "
                "verified: set it for the whole model, before that is enabled"
            )
        mask = self.given(args, kwargs, self.mask_name)
        new: dict[str, Any] = {}
        sinks: SinkRows = []
        if backend == "flash":
            mask, new, sinks = self._flash(settings, mask, self._hidden(args, kwargs))
        elif mask is not None:
            mask = _own_mask(settings, mask, backend)
        elif settings.span.sinks:
            mask = _mask_of_sinks(settings.span, self._hidden(args, kwargs))
        elif backend == "sdpa" and backend not in settings.omits_mask_on:  # it takes None for causal
            hidden = self._hidden(args, kwargs)
            mask = hidden.new_zeros(()).expand(hidden.shape[0], 1, hidden.shape[1], hidden.shape[1])
        is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
        adds = backend == "sdpa" and self.given(args, kwargs, "output_attentions")  # Falcon then adds it to the scores
        if is_bool and (adds or (backend == "eager" and settings.handling.kind == "ready")):  # eager in a model on SDPA
            mask = additive(mask, self._hidden(args, kwargs).dtype)
        bias = self.given(args, kwargs, self.bias_name)
        if isinstance(bias, Tensor) and bias.shape[-2] == 1 and self.bias_name:
            # A mask per head has the bias in it already.
            merged = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
            if self.adds_bias_by_key and not merged:
                raise UnsupportedModelError(
                    f"{type(module).__name__} of this transformers adds one ALiBi bias a key for all queries, which has no "
                    "bidirectional form: use attn_implementation='sdpa' without output_attentions, or transformers 4.45 or newer"
                )
            length = self._hidden(args, kwargs).shape[1]
            new[self.bias_name] = torch.zeros_like(bias) if merged else mirrored_bias(bias, length)
        if kwargs.get("is_causal") is not None:  # from the config, which may say True
            new["is_causal"] = False
        future = self.given(args, kwargs, self.future_name)
        if isinstance(future, Tensor) and self.future_name:
            new[self.future_name] = torch.minimum(future, future.mT)
        if settings.compares_positions and isinstance(mask, Tensor) and mask.dim() == 4:
            new["position_ids"] = MaskedPositions.of(mask)
        if self.mask_name:
            new[self.mask_name] = mask
        args = tuple(new.pop(name, value) for name, value in zip(self.names, args)) + args[len(self.names) :]
        return args, {**kwargs, **new}, sinks

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> Any:
        """The argument `name` of a call, None if it isn't given."""
        if name is None or name not in self.names:
            return None
        at = self.names.index(name)
        return args[at] if len(args) > at else kwargs.get(name)

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs[self.names[0]]

    def _flash(self, settings: AttentionSettings, mask: Any, hidden: Tensor) -> tuple[Any, dict[str, Any], SinkRows]:
        if settings.needs_shorter_window:
            raise OrderError(
                "attn_implementation was changed to FlashAttention on a bidirectional model with a sliding window, which this "
                "transformers counts differently there: disable_bidirectional, change it, enable_bidirectional"
            )
        span = settings.span
        if span.sinks and not in_use.mask_is_ours():
            raise OrderError(
                "a forward that was taken before the model was made bidirectional, or a layer by itself, was called with sink "
                "tokens on FlashAttention, where only the model's own forward tells which tokens are sinks: call the model"
            )
        if span.sinks and not are_sequence_numbers(mask):  # the model's own mask code handed on a 2D mask, or none
            batch, length = hidden.shape[:2]
            real = mask.to(torch.bool) if isinstance(mask, Tensor) and mask.dim() == 2 else None
            numbers = sequence_numbers(Sequences(batch, length, hidden.device, real, None), (span,))
            if numbers is None:
                return mask, {}, first_tokens(batch, length, span.sinks, hidden.device)
            mask = numbers.expand(-1, settings.spans, -1, -1)
        if not are_sequence_numbers(mask):
            return mask, {}, []
        run = how_to_run(mask, settings.index)
        is_sequence = span.sinks == 1 and not span.sees_sinks  # of its own, of one token
        sinks = [] if is_sequence else run.sinks
        if run.positions is None:
            return run.mask, {}, sinks
        if self.plans_its_own_padding:
            return mask, {}, sinks
        if self.takes_any_keyword:
            return (
                None,
                {
                    "position_ids": run.positions,
                    "cu_seq_lens_q": run.cu_seq_lens,
                    "cu_seq_lens_k": run.cu_seq_lens,
                    "max_length_q": run.max_length,
                    "max_length_k": run.max_length,
                },
                sinks,
            )
        if not bool((torch.diff(run.positions, dim=-1) < 0).any()):
            raise AttentionMaskError(
                "packed sequences of one token each can't be told apart by FlashAttention in this transformers: use "
                "attn_implementation='sdpa' or transformers 4.47 or newer"
            )
        return None, {"position_ids": run.positions}, sinks


def _mask_of_sinks(span: Span, hidden: Tensor) -> Tensor:
    """An additive mask (batch, 1, length, length) for input (batch, length, width) of which nothing but sinks is hidden."""
    batch, length = hidden.shape[:2]
    whole = Sequences(batch, length, hidden.device, None, None)
    return dense_mask(whole, (Span(sinks=span.sinks, sees_sinks=span.sees_sinks),), hidden.dtype, False, False)


def _own_mask(settings: AttentionSettings, mask: Any, backend: str) -> Any:
    """The module's mask out of what its model handed on."""
    if settings.handling.kind != "ready":
        return mirrored_mask(mask, settings.handling.made_is_hidden, settings.span)
    if not in_use.mask_is_ours():
        return mirrored_mask(pick(mask, settings.index, settings.spans, False), span=settings.span)
    return pick(mask, settings.index, settings.spans, backend in settings.omits_mask_on)
