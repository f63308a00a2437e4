"""What a swapped instance does differently in its forward: two mixins, one for the model that builds the mask and one
for the attention modules that use it. Neither copies anything of the original's forward: each changes the arguments.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import masks
from ..errors import AttentionMaskError, CacheError, OrderError, UnsupportedModelError
from ..model.find import Decoder, Reach, bias_parameter, causal_flags, mask_parameter, parameter_names
from ..attention.forms import Form
from ..attention.mirror import Sight, is_banded, mirrored_bias, mirrored_mask, triangular_buffers
from ..swap.swap import Swapped
from ..swap.modes import running

CROSS = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "kv")  # another sequence's, by family
CACHES = ("past_key_values", "cache", "cache_params", "layer_past", "past")  # the name of a KV cache, by era and family


class BidirectionalModel(Swapped):
    """A model that builds the mask: hands a ready bidirectional mask to its own forward, and keeps no KV cache."""

    _names: tuple[str, ...]
    _bidirect_patch_reaches: tuple[Reach, ...]
    _bidirect_patch_form: Form
    _bidirect_patch_proof: Callable[[nn.Module], bool] | None  # the one that enabling had to leave for the first forward

    @classmethod
    def __init_mixed__(cls, original: type) -> None:
        inner = original.forward  # type: ignore[attr-defined]

        @wraps(inner)
        def forward(self, *args, **kwargs):
            kwargs = {**dict(zip(cls._names, args)), **kwargs}
            kwargs = self._bidirectional_arguments(kwargs)
            if torch.compiler.is_compiling():  # a lock has no meaning in a graph
                return inner(self, **kwargs)
            with running(self):
                unseen = self._bidirect_patch_proof is not None and not self._prove()
                result = inner(self, **kwargs)
                if unseen:  # not before: where the model doesn't run either, its own error says more
                    raise UnsupportedModelError(
                        f"{original.__name__} runs, but neither a small random model of it nor itself could be run on random "
                        "tokens, so that nothing shows whether each layer is bidirectional. allow_partial=True takes it on "
                        "trust"
                    )
                return result

        cls.forward = forward  # type: ignore[attr-defined]
        cls._names = parameter_names(original)
        cls._mask_name = mask_parameter(original)  # type: ignore[attr-defined]
        # Before 4.53 the mask code is a method of the model: it has nothing left to do. Elsewhere, and in each model
        # from 4.53 on, it lets a ready mask pass.
        if hasattr(original, "_update_causal_mask"):

            def _update_causal_mask(self, attention_mask, *args, **kwargs):
                if getattr(attention_mask, "ndim", 2) != 4 and self._bidirect_patch_form.code != "ready":
                    return original._update_causal_mask(self, attention_mask, *args, **kwargs)
                return attention_mask

            cls._update_causal_mask = _update_causal_mask  # type: ignore[attr-defined]

    def get_extended_attention_mask(self, attention_mask, *args, **kwargs):  # BERT and kin until 5.3
        if attention_mask.dim() == 4:
            return attention_mask
        return super().get_extended_attention_mask(attention_mask, *args, **kwargs)  # type: ignore[misc]

    def _bidirectional_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = next((name for name in CACHES if kwargs.get(name) is not None), None)
        if given:
            raise CacheError(
                f"{given} was passed to a bidirectional model: a KV cache only has a meaning while attention is "
                "causal. Leave it out (prefix tuning can't), or run causally inside `with bidirectional(model, enabled=False):`"
            )
        if "use_cache" in self._names:
            kwargs["use_cache"] = False
        kwargs.pop("is_causal", None)  # transformers 5.2 and newer put it above the modules' own flag
        form, name = self._bidirect_patch_form, self._mask_name  # type: ignore[attr-defined]
        mask: Any = kwargs.get(name)
        inputs = given_input(kwargs)
        if inputs is None or isinstance(mask, dict) or _is_block_mask(mask):
            return kwargs  # the model reports missing input itself; a ready mask is the user's own
        if isinstance(mask, Tensor) and mask.dim() == 4:
            _check_ready(mask, inputs.shape[0], inputs.shape[1])
            if masks.ONES_AND_ZEROS and not form.inverted and mask.max() > 0:
                dtype = self._embedding_dtype()
                kwargs[name] = torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)
            return kwargs
        if mask is not None and not isinstance(mask, Tensor):
            raise AttentionMaskError(f"attention_mask must be a tensor or None, got {type(mask).__name__}")
        layout = masks.read_layout(
            mask,
            kwargs.get("position_ids"),
            kwargs.get("cu_seq_lens_q"),
            inputs.shape[0],
            inputs.shape[1],
            inputs.device,
        )
        if form.code != "ready" and layout.document is None:
            return kwargs
        if form.code == "own":
            raise AttentionMaskError(
                f"packed documents (position_ids that restart) can't be told apart by {type(self).__name__}, whose own mask "
                "code takes nothing but a 2D mask: pass one document a row, with padding"
            )
        dtype = inputs.dtype if inputs.is_floating_point() else self._embedding_dtype()
        backend = masks.backend_of(text_config(self.config))  # type: ignore[attr-defined]
        kwargs[name] = masks.ready_mask(layout, self._bidirect_patch_reaches, backend, dtype, form.inverted)
        return kwargs

    def _prove(self) -> bool:
        proof, self._bidirect_patch_proof = self._bidirect_patch_proof, None  # it runs this forward
        seen = False
        try:
            seen = proof(self)  # type: ignore[misc, arg-type]
        finally:
            if not seen:
                self._bidirect_patch_proof = proof
        return seen

    def _embedding_dtype(self) -> torch.dtype:
        weight = getattr(self.get_input_embeddings(), "weight", None)  # type: ignore[attr-defined]
        dtype = weight.dtype if weight is not None else self.dtype  # type: ignore[attr-defined]
        return dtype if dtype.is_floating_point else self.dtype  # type: ignore[attr-defined]


def _check_ready(mask: Tensor, batch: int, length: int) -> None:
    # (batch, K, 1, length) is what an outer model made for FlashAttention
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, length) or mask.shape[3] != length:
        raise AttentionMaskError(
            f"a ready 4D attention_mask of shape {tuple(mask.shape)} for input of {batch} x {length} tokens: give "
            f"({batch}, 1, {length}, {length}), or the 2D mask ({batch}, {length})"
        )


def _is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask"


class BidirectionalAttention(Swapped):
    """An attention module: takes the mask of its own reach, and is not causal."""

    _names: tuple[str, ...]
    _bidirect_patch_reach: tuple[int, int]  # which of how many reaches
    _bidirect_patch_config: Any  # the decoder's, for attention modules that keep none
    _bidirect_patch_needs_no_mask: tuple[str, ...]  # backends
    _bidirect_patch_form: Form
    _bidirect_patch_shortens: bool  # its window has to be handed to FlashAttention one shorter, and isn't
    _bidirect_patch_compares: bool  # it has a part that tells the past by position_ids

    @classmethod
    def __init_mixed__(cls, original: type) -> None:
        inner = original.forward  # type: ignore[attr-defined]

        @wraps(inner)
        def forward(self, *args, **kwargs):
            args, kwargs = self._bidirectional_arguments(args, kwargs)
            return inner(self, *args, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]
        cls._names = parameter_names(original)
        cls._mask_name = mask_parameter(original)  # type: ignore[attr-defined]
        cls._bias_name = bias_parameter(original)  # type: ignore[attr-defined]
        # Beside the mask a matrix (n, n) that is 1 where the future is: CTRL until 5.2.
        cls._future_name = "mask" if {"mask", "attention_mask"} <= set(cls._names) else None  # type: ignore[attr-defined]
        kinds = [p.kind for p in inspect.signature(original.forward).parameters.values()]  # type: ignore[attr-defined]
        cls._takes_any = inspect.Parameter.VAR_KEYWORD in kinds  # type: ignore[attr-defined]
        if hasattr(original, "_upad_input"):  # FlashAttention before 4.43: the only place that sets cu_seqlens
            cls._upad_input = _upad_input  # type: ignore[attr-defined]

    def _bidirectional_arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = self._argument(args, kwargs, self._mask_name)  # type: ignore[attr-defined]
        index, count = self._bidirect_patch_reach
        backend = masks.backend_of(getattr(self, "config", self._bidirect_patch_config))
        extra: dict[str, Any] = {}
        form = self._bidirect_patch_form
        if any(self._argument(args, kwargs, n) is not None for n in CROSS):
            return args, kwargs  # attention to another sequence is not causal
        if backend == "flash":
            mask, extra = self._flash_arguments(mask, index)
        elif mask is not None and form.code != "ready":
            mask = mirrored_mask(mask, form.inverted)
        elif mask is not None:
            mask = masks.pick(mask, index, count, backend in self._bidirect_patch_needs_no_mask)
        elif backend == "sdpa" and not form.drops:  # it takes None for causal
            hidden = self._hidden(args, kwargs)
            mask = hidden.new_zeros(()).expand(hidden.shape[0], 1, hidden.shape[1], hidden.shape[1])
        bias = self._argument(args, kwargs, self._bias_name)  # type: ignore[attr-defined]
        if isinstance(bias, Tensor) and bias.shape[-2] == 1:
            hidden = self._hidden(args, kwargs)
            # A mask per head has the bias in it already.
            merged = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
            extra[self._bias_name] = torch.zeros_like(bias) if merged else mirrored_bias(bias, hidden.shape[1])  # type: ignore[attr-defined]
        if kwargs.get("is_causal") is not None:  # from the config, which may say True
            extra["is_causal"] = False
        future = self._argument(args, kwargs, self._future_name)  # type: ignore[attr-defined]
        if isinstance(future, Tensor):
            extra[self._future_name] = torch.minimum(future, future.mT)  # type: ignore[attr-defined]
        if self._bidirect_patch_compares and isinstance(mask, Tensor) and mask.dim() == 4:
            extra["position_ids"] = Sight.of(mask)
        return self._with_arguments(args, kwargs, {**extra, self._mask_name: mask})  # type: ignore[attr-defined]

    def _hidden(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs[self._names[0]]

    def _argument(self, args: tuple, kwargs: dict[str, Any], name: str | None) -> Any:
        if name not in self._names:
            return None
        at = self._names.index(name)
        return args[at] if len(args) > at else kwargs.get(name)

    def _with_arguments(self, args: tuple, kwargs: dict[str, Any], new: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args = tuple(new.pop(n, a) for n, a in zip(self._names, args)) + args[len(self._names) :]
        return args, {**kwargs, **new}

    def _flash_arguments(self, mask: Any, index: int) -> tuple[Any, dict[str, Any]]:
        if self._bidirect_patch_shortens:
            raise OrderError(
                "attn_implementation was changed to FlashAttention on a bidirectional model with a sliding window, which this "
                "transformers counts differently there: disable_bidirectional, change it, enable_bidirectional"
            )
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != 1:
            return mask, {}
        plan = _plans(mask)[index]
        if plan.positions is None:
            return plan.mask, {}
        if hasattr(self, "_upad_input"):
            return mask, {}
        extra: dict[str, Any] = {"position_ids": plan.positions}
        if self._takes_any:  # type: ignore[attr-defined]
            lengths = {"cu_seq_lens_q": plan.cu_seq_lens, "cu_seq_lens_k": plan.cu_seq_lens}
            extra.update(lengths, max_length_q=plan.max_length, max_length_k=plan.max_length)
        elif not bool((torch.diff(plan.positions, dim=-1) < 0).any()):
            raise AttentionMaskError(
                "packed documents of one token each can't be told apart by FlashAttention in this transformers: "
                "use attn_implementation='sdpa' or transformers 4.47 or newer"
            )
        return None, extra


def _plans(documents: Tensor) -> list[masks.FlashPlan]:
    # Kept on the tensor, which the layers of one forward share; a checkpoint's replay may lose it and plan again.
    plans = getattr(documents, "_bidirect_patch_plans", None)
    if plans is None:
        plans = [masks.flash_plan(documents[:, i, 0]) for i in range(documents.shape[1])]
        documents._bidirect_patch_plans = plans  # type: ignore[attr-defined]
    return plans


def _upad_input(self, query, key, value, attention_mask, query_length):
    """cu_seqlens of packed documents, where transformers' own knows only padding. q, k, v: (batch, length, heads, dim)."""
    if attention_mask.dim() == 2:
        return self._original._upad_input(self, query, key, value, attention_mask, query_length)
    plan = _plans(attention_mask)[self._bidirect_patch_reach[0]]
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    indices = torch.arange(query.shape[0] * query.shape[1], device=query.device)
    return *flat, indices, (plan.cu_seq_lens,) * 2, (plan.max_length,) * 2


class BidirectionalPart(Swapped):
    """A part of an attention module that holds a flag or a triangular buffer; its methods stay as they are."""


class ConfigView:
    """A config with some attributes changed; all others are read from the original at each access."""

    def __init__(self, config: Any, **changed: Any) -> None:
        self.__dict__.update(_config=config, **changed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # not there yet while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def given_input(kwargs: dict[str, Any]) -> Tensor | None:
    """What a forward is to run on: its `inputs_embeds` (batch, seq, width) or `input_ids` (batch, seq)."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


def text_config(config: Any) -> Any:
    """The text part of a config that may be composite (transformers before 4.42 has none)."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_attributes(decoder: Decoder, attention: nn.Module, reach: Reach, form: Form) -> dict[str, Any]:
    """Instance attributes that make one attention module of `decoder` bidirectional, beside its class."""
    config = text_config(decoder.module.config)
    reaches = decoder.reaches
    # A part that reads the mask too, or compares positions (a sparse attention's indexer), can't do without one.
    parts = [m for m in attention.modules() if m is not attention and next(m.parameters(), None) is not None]
    reads = any(mask_parameter(type(m)) for m in parts)
    compares = not reads and any("position_ids" in parameter_names(type(m)) for m in parts)
    windows = [m for m in attention.modules() if any(map(is_banded, triangular_buffers(m).values()))]
    if windows and masks.backend_of(config) == "flash":
        raise UnsupportedModelError(
            f"{type(windows[0]).__name__} keeps its layer's window in a buffer, which transformers doesn't hand to "
            "FlashAttention: it would see everything. Use attn_implementation='eager'"
        )
    attributes: dict[str, Any] = {
        **dict.fromkeys(("is_causal", *causal_flags(attention)), False),
        "_bidirect_patch_reach": (reaches.index(reach), len(reaches)),
        "_bidirect_patch_config": config,
        "_bidirect_patch_needs_no_mask": () if reads or compares or not form.drops else masks.WITHOUT_MASK,
        "_bidirect_patch_compares": compares,
        "_bidirect_patch_form": form,
    }
    flash = masks.backend_of(config) == "flash"
    attributes["_bidirect_patch_shortens"] = reach.window is not None and masks.FLASH_WINDOW_IS_INCLUSIVE and not flash
    if flash and masks.FLASH_WINDOW_IS_INCLUSIVE:
        attributes |= _own_window(attention, reach.window)
    return attributes


def _own_window(attention: nn.Module, window: int | None) -> dict[str, Any]:
    """What makes an older attention module hand `|q-k| < window` to FlashAttention, in its own layers and no others."""
    shorter = None if window is None else window - 1
    if "sliding_window" in attention.__dict__:
        return {} if window is None else {"sliding_window": shorter}
    config = getattr(attention, "config", None)
    if getattr(config, "sliding_window", None) is None:
        return {}
    return {"config": ConfigView(config, sliding_window=shorter, max_window_layers=masks.FLASH_WINDOWS_LAYERS_FROM)}


def rebound_forward(module: nn.Module, cls: type) -> dict[str, Any]:
    """accelerate's hooks call the forward that they found on the instance: hand them the swapped class's."""
    if "forward" not in module.__dict__:
        return {}
    if "_old_forward" in module.__dict__:
        return {"_old_forward": MethodType(cls.forward, module)}  # type: ignore[attr-defined]
    raise OrderError(
        f"{type(module).__name__}.forward was replaced on the instance by "
        f"{getattr(module.__dict__['forward'], '__qualname__', module.__dict__['forward'])}, which a swap of its class would "
        "not reach: make the model bidirectional first, then apply the other patch"
    )
