"""The forward of a model that makes the mask: it hands a bidirectional mask to its own code, and keeps no KV cache."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from ..errors import ArgumentError, AttentionMaskError, CacheError, OrderError
from ..model.config import backend_of, is_known_kernel, kernel_of, text_config
from ..model.facts import (
    CACHES,
    given_input,
    mask_parameter,
    names_in_forward,
    parameter_names,
    puts_states_first,
    takes_any_keyword,
)
from ..model.sinks import NO_SINKS, sinks_of
from ..model.walk import modules_of
from ..swap import in_use
from ..swap.classes import Swapped, has_mixin, original, set_forward
from ..swap.modes import Mode
from ..swap.record import settings_of
from ..swap.recording import is_graph_captured, values_are_unknown
from .causal_masks import warn_if_causal
from .label_leak import look_around
from .mixed import (
    check_attributes,
    check_decoder_inside,
    check_layers,
    check_model_around,
    decoder_inside,
    enabling,
    has_maker_under_way,
)
from .module_settings import ModelSettings
from .old_releases import LetsReadyMaskPass, step_aside
from .padding_and_packing import read_boundaries, read_positions, read_sequences
from .ready_mask import is_users_own, make_mask, users_mask
from .recompute import note_checkpoints
from .versions import READY_MASKS_ARE_INVERTED


class BidirectionalModel(LetsReadyMaskPass):
    """A model that makes the mask, while it is bidirectional."""

    opens = True
    note = "bidirectional"

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""
        names, mask_name = parameter_names(original), mask_parameter(original)
        takes_is_causal = _takes_is_causal(original)

        def arguments(model: Any, settings: ModelSettings, kwargs: dict[str, Any], called_by_outer: bool) -> dict[str, Any]:
            _check_cache(kwargs)
            _check_states(original, kwargs)
            if "use_cache" in names:
                kwargs["use_cache"] = False
            if takes_is_causal:  # transformers puts it above the modules' own flag
                _check_not_causal(original, kwargs.pop("is_causal", None), settings)
            inputs = given_input(kwargs)
            _check_input(inputs, kwargs)
            if isinstance(inputs, Tensor) and mask_name is not None:  # else the model reports missing input itself
                from_outer = called_by_outer and (settings.has_outer_maker or has_maker_under_way(model))
                mask = _mask(model, settings, kwargs.get(mask_name), inputs, kwargs, from_outer)
                if getattr(kwargs.get("position_ids"), "ndim", 2) == 1:  # checked: (length,); most models take no such shape
                    kwargs["position_ids"] = kwargs["position_ids"][None]
                if mask is not _KEEP:
                    kwargs[mask_name] = mask
            return kwargs

        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs = named_arguments(original, names, args, kwargs)
            if is_graph_captured():  # a lock has no meaning in a graph
                settings = settings_of(self, ModelSettings)
                assert settings is not None  # the class is this one
                _check_kernel(self, settings)
                check_decoder_inside(self)
                kwargs = arguments(self, settings, kwargs, in_use.is_in_patched())
                before = in_use.enter_recorded(decoder_inside(self))
                try:
                    return inner(self, **kwargs)
                finally:
                    in_use.leave_recorded(before)
            look_around()
            inside = decoder_inside(self)
            with in_use.running(self, inside) as this_forward:
                settings = settings_of(self, ModelSettings)
                if settings is None:  # another thread changed the mode before this forward was counted
                    return inner(self, **kwargs)
                check_attributes(self)
                _check_kernel(self, settings)
                check_layers(self, settings.places)
                check_decoder_inside(self)
                note_checkpoints(self)
                called_by_outer = in_use.is_in_patched()  # a patched forward is under way already
                if not called_by_outer and not is_users_own(kwargs.get(mask_name or "")):
                    check_model_around(self)
                with in_use.patched(this_forward, inside):
                    return inner(self, **arguments(self, settings, kwargs, called_by_outer))

        set_forward(cls, forward, below)
        step_aside(cls, original)


class WithoutCache(Swapped):
    """A model around a bidirectional one, for which it would make a KV cache (Idefics, SmolVLM)."""

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""
        names = parameter_names(original)

        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self, **{**named_arguments(original, names, args, kwargs), "use_cache": False})

        set_forward(cls, forward, below)


class CausalBlock(Swapped):
    """A bidirectional model inside `with bidirectional(model, enabled=False):`, where it is what it was before the patch.

    Only a thread or task that opened such a block may call it.
    """

    note = "in a causal block"

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""

        takes_is_causal = _takes_is_causal(original)

        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            if takes_is_causal and kwargs.get("is_causal") is False:
                raise ArgumentError(
                    f"is_causal=False was given to {original.__name__} in a causal block: leave it out, and end the block, "
                    "`with bidirectional(model, enabled=False):`, before the model is called bidirectionally"
                )
            if is_graph_captured() and not is_tracing():  # the caller of a graph isn't known; a trace has one
                return inner(self, *args, **kwargs)
            in_use.check_caller(self)
            note_checkpoints(self)
            with in_use.running(self), in_use.attending(Mode.CAUSAL_BLOCK):
                return inner(self, *args, **kwargs)

        set_forward(cls, forward, below)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: refused to who is in no such block, since the copy would be causal for good."""
        in_use.check_caller(self, "copied")  # type: ignore[arg-type]  # a module
        return super().__reduce_ex__(protocol)


def holds_causal_block(model: nn.Module) -> bool:
    """Whether a decoder in `model` is in a causal block, opened by any thread."""
    return any(has_mixin(module, CausalBlock) for module in modules_of(model))


def check_not_in_others_block(model: nn.Module) -> None:
    """Raise ModeConflictError if only others hold a decoder of `model` in a causal block, where it would be saved as causal."""
    for module in modules_of(model):
        if has_mixin(module, CausalBlock):
            in_use.check_caller(module, "saved")


def named_arguments(cls: type, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, all by name.

    Raises:
        ArgumentError: an argument too many, or one that is given twice, as for the stock forward.
    """
    if len(args) > len(names):
        taken = f"{len(names)} positional arguments ({', '.join(names)})"
        raise ArgumentError(f"{cls.__name__}.forward takes {taken}, not {len(args)}")
    by_place = dict(zip(names, args))
    for name in by_place:
        if name in kwargs:
            raise ArgumentError(f"{cls.__name__}.forward got two values for the argument {name!r}: give it once")
    return {**by_place, **kwargs}


def _takes_is_causal(cls: type) -> bool:
    """Whether `is_causal` may be a keyword of a call, which is handed on to the attention functions."""
    return takes_any_keyword(cls) or "is_causal" in parameter_names(cls)


def _check_not_causal(cls: type, is_causal: Any, settings: ModelSettings) -> None:
    """Raise ArgumentError if a call asks for causal attention by keyword."""
    if is_causal and not settings.config_is_causal:
        raise ArgumentError(
            f"is_causal={is_causal!r} was given to {cls.__name__} while it is bidirectional: leave it out, or call the model "
            "inside `with bidirectional(model, enabled=False):`"
        )


def _check_kernel(model: Any, settings: ModelSettings) -> None:
    kernel = kernel_of(text_config(model.config))
    if settings.code is not None and not is_known_kernel(kernel, settings.code.kernel):
        raise OrderError(
            f"attn_implementation of a bidirectional {original(type(model)).__name__} was set to {kernel!r}, with which it was "
            f"not verified: call {enabling(model)} again"
        )


def _check_cache(kwargs: dict[str, Any]) -> None:
    given = next((name for name in CACHES if kwargs.get(name) is not None), None)
    if given:
        raise CacheError(
            f"{given} ({type(kwargs[given]).__name__}) was passed to a bidirectional model: a KV cache only has a meaning while "
            "attention is causal. Leave it out (prefix tuning can't), or run causally inside `with "
            "bidirectional(model, enabled=False):`. If a model around this one made it, call enable_bidirectional on that model"
        )


def _check_states(cls: type, kwargs: dict[str, Any]) -> None:
    """Raise ArgumentError for states of an encoder that the model would put before the tokens, which the mask is for."""
    if kwargs.get("encoder_hidden_states") is not None and puts_states_first(cls):
        raise ArgumentError(
            f"encoder_hidden_states were given to {cls.__name__}, which puts them before the tokens: a bidirectional model takes "
            "tokens alone. Leave them out, or call the model inside `with bidirectional(model, enabled=False):`"
        )


def _check_input(inputs: Any, kwargs: dict[str, Any]) -> None:
    """Raise ArgumentError if a row or a width is missing; what is no tensor, the model reports itself."""
    name, form = ("input_ids", "(batch, length)")
    if kwargs.get("inputs_embeds") is not None:
        name, form = ("inputs_embeds", "(batch, length, width)")
    if isinstance(inputs, Tensor) and inputs.dim() < form.count(",") + 1:
        raise ArgumentError(f"{name} of shape {tuple(inputs.shape)}: give {form}, one text as a batch of one ({name}[None])")


def _check_boundaries(kwargs: dict[str, Any]) -> None:
    """Raise AttentionMaskError if the boundaries of keys are not those of queries."""
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if keys is None or keys is queries or values_are_unknown():
        return
    given = [each.tolist() if isinstance(each, Tensor) else type(each).__name__ for each in (queries, keys)]
    if not isinstance(keys, Tensor) or given[0] != given[1]:
        raise AttentionMaskError(
            f"cu_seq_lens_k {given[1]} beside cu_seq_lens_q {given[0]}: give the same tensor for both, since every token attends "
            "to its own sequence"
        )


def _check_kinds(model: Any, config: Any, mask: Any) -> None:
    """Raise AttentionMaskError if a dict of masks is given to a model that takes none, or lacks a kind of its layers."""
    if not isinstance(mask, dict):
        return
    held = ", ".join(map(repr, mask)) or "nothing"
    if not {"dict", "Mapping"} & names_in_forward(original(type(model))):  # a guess by name, from `isinstance(mask, dict)`
        raise AttentionMaskError(
            f"attention_mask is a dict of {held}, and {type(model).__name__} takes one mask for all layers: "
            "give a 2D mask, or a ready 4D mask"
        )
    lacking = {*(getattr(config, "layer_types", None) or ())} & _MASKED_KINDS - mask.keys()
    if lacking:
        raise AttentionMaskError(
            f"attention_mask is a dict of {held} and lacks {', '.join(sorted(lacking))}: give a ready mask or None for each kind "
            f"of layer of {type(model).__name__}"
        )


_MASKED_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_KEEP: Any = object()


def _mask(
    model: Any, settings: ModelSettings, mask: Any, inputs: Tensor, kwargs: dict[str, Any], from_outer: bool
) -> Any:
    """The mask to hand on; `_KEEP` where the model's own mask code needs what it was given, or the model around made it."""
    config, handling = text_config(model.config), settings.handling
    batch, length = inputs.shape[:2]
    dtype = inputs.dtype if inputs.is_floating_point() else _embedding_dtype(model)
    if is_users_own(mask):
        heads = getattr(config, "num_attention_heads", 1)
        if from_outer and _is_from_outside(mask, len(settings.spans), heads):
            return _KEEP
        _check_kinds(model, config, mask)
        # The mask says who sees whom; these must be right all the same.
        if kwargs.get("position_ids") is not None:
            read_positions(kwargs["position_ids"], batch, length)
        if kwargs.get("cu_seq_lens_q") is not None:
            read_boundaries(kwargs["cu_seq_lens_q"], batch, length, inputs.device)
        _check_boundaries(kwargs)
        is_ones = handling.ready_is_ones
        ready = users_mask(mask, len(settings.spans), batch, length, heads, backend_of(config), dtype, is_ones)
        if handling.kind != "ready":
            _check_symmetric(model, mask)
            _check_without_sinks(model)
        warn_if_causal(model, mask)
        return ready
    _check_boundaries(kwargs)
    sequences = read_sequences(
        mask, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"), batch, length, inputs.device
    )
    if handling.kind != "ready" and sequences.number is None:
        return _KEEP
    if handling.kind == "own":
        sinkless = " with sinkless layers" * any(not span.sees_sinks for span in settings.spans)
        raise AttentionMaskError(
            f"packed sequences (position_ids that start again) can't be told apart by {type(model).__name__}{sinkless}, whose "
            "own mask code takes nothing but a 2D mask: pass one sequence per row, with padding"
        )
    return make_mask(sequences, settings.spans, backend_of(config), dtype, handling.ready_is_ones)


def _check_symmetric(model: Any, mask: Any) -> None:
    """Raise AttentionMaskError if a ready mask would change by being mirrored, as masks are in models that aren't "ready"."""
    if not isinstance(mask, Tensor) or mask.shape[-2] == 1 or mask.is_meta or values_are_unknown():
        return
    is_bool = mask.dtype == torch.bool
    seen = mask if is_bool else mask > torch.finfo(mask.dtype).min / 2
    # Until 4.42 such mask code takes ones and zeros, or takes none and says nothing.
    if READY_MASKS_ARE_INVERTED or not torch.equal(seen, seen.mT) or not (is_bool or bool((mask[seen] == 0).all())):
        raise AttentionMaskError(
            f"the ready 4D attention_mask of {type(model).__name__} must let two positions see each other or neither, with 0 "
            "added where they do: this model's own mask code takes no other. Give the 2D mask"
        )


def _check_without_sinks(model: Any) -> None:
    """Raise AttentionMaskError for a ready mask where sink tokens would change it, as in models that aren't "ready"."""
    sinks = sinks_of(model)
    if sinks != NO_SINKS:
        raise AttentionMaskError(
            f"a ready attention_mask of {type(model).__name__} with {sinks.in_words}: this model's own mask code would put the "
            "sink tokens into it. Give the 2D mask, or num_sink_tokens=0"
        )


def _is_from_outside(mask: Any, spans: int, heads: int) -> bool:
    """Whether a finished mask was made or checked by the patched model around this one."""
    return not isinstance(mask, Tensor) or mask.shape[1] in (1, spans, spans * heads)


def _embedding_dtype(model: Any) -> torch.dtype:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    dtype = weight.dtype if weight is not None else model.dtype
    return dtype if dtype.is_floating_point else model.dtype
