"""Find what has to be swapped in a model, or say why it can't be.

One rule serves every family: a decoder is a `PreTrainedModel` that builds a causal mask for the attention modules in
its list of layers. A layer that holds no attention module, or something else that mixes tokens beside it, is in the way.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from types import CodeType
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..attention.mirror import triangular_buffers
from ..swap.swap import before_swaps, original

# Token mixers that carry state from left to right, by the field's names for them, and compressors (DeepSeek-V4), which
# pool each run of tokens with the run before it into one key. attention_report finds the ones that hide behind other names.
_RECURRENT = re.compile(
    r"Mamba|SSM|R[Ww][Kk][Vv]|Delta(Net|Attention|Rule)|LinearAttention|Lightning|Recurrent(?!Gemma)|R[gG]L?RU|LSTM"
    r"|ShortConv|Retention|Hyena|Compressor$"
)
_ATTENTION = re.compile(r"[Aa]ttention|Attn$")
# Parts of a layer that treat each position alone; a layer of nothing else mixes nothing.
_POSITIONWISE = re.compile(r"MLP|M[oO]E|Experts?|FeedForward|FFN|Norm|Linear|Dropout|Identity|Router|Activation")
_KIND = re.compile(r"layer_type|attention_type|is_sliding|is_chunked")
_BUILDS_CAUSAL_MASK = re.compile(r"causal_mask|causal_attention_mask|masks_for_generate|prepare_decoder_attention_mask")
_OLDER_CAUSAL_MASK = re.compile(r"^tri[lu]$")  # made on the spot, as CTRL and GIT did
_FLAGS = ("is_causal", "causal")  # what an attention module or, in XLM, the model says of itself


Function = TypeVar("Function", bound=Callable[..., Any])


def per_class(function: Function) -> Function:
    """Cache what a function finds out about a class."""
    return lru_cache(maxsize=None)(function)  # type: ignore[return-value]


class Reach(NamedTuple):
    """How far one attention module sees: |q-k| < window, and the same chunk of `chunk` positions. None: no limit."""

    window: int | None = None
    chunk: int | None = None


@dataclass
class Decoder:
    """One decoder in a model: the module that builds the mask and the attention modules that use it."""

    name: str
    module: PreTrainedModel
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    attentions: list[tuple[str, nn.Module, Reach]] = field(default_factory=list)
    in_the_way: list[str] = field(default_factory=list)
    builders: list[PreTrainedModel] = field(default_factory=list)  # models around it that build its mask, as some do

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """The distinct reaches of its attention modules, in order of first appearance."""
        return tuple(dict.fromkeys(reach for _, _, reach in self.attentions))


def forwards(cls: type) -> Iterator[Any]:
    """Its forward and those that it overrides and may call."""
    return (base.__dict__["forward"] for base in cls.__mro__ if base is not nn.Module and "forward" in base.__dict__)


@per_class
def parameter_names(cls: type) -> tuple[str, ...]:
    """The names that `cls.forward` takes, in order; those of what it overrides too, if it hands on *args or **kwargs."""
    names: dict[str, None] = {}
    for forward in forwards(cls):
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        rest = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names |= dict.fromkeys(p.name for p in parameters if p.name not in rest)
        if not rest:
            break
    return tuple(names)


@per_class
def mask_parameter(cls: type) -> str | None:
    """The name of the mask among the parameters of `cls.forward`."""
    return next((n for n in ("attention_mask", "attn_mask", "mask") if n in parameter_names(cls)), None)


@per_class
def bias_parameter(cls: type) -> str | None:
    """The name of an ALiBi bias among the parameters of `cls.forward`."""
    return next((n for n in ("alibi", "position_bias") if n in parameter_names(cls)), None)


def is_attention(module: nn.Module) -> bool:
    """A module that mixes tokens under a mask that it is handed."""
    return mask_parameter(type(module)) is not None and (
        "is_causal" in module.__dict__ or _is_named_attention(type(module))
    )


@per_class
def _is_named_attention(cls: type) -> bool:
    if cls.__module__.startswith("torch."):  # nn.MultiheadAttention, in a pooler say
        return False
    return any(_ATTENTION.search(c.__name__) for c in cls.__mro__) and not _RECURRENT.search(cls.__name__)


def decoders(model: Any) -> list[Decoder]:
    """Every decoder in `model`. Raises UnsupportedModelError when there is none, naming what there is."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module that holds a transformers decoder, got {type(model).__name__}: load the model "
            "first (AutoModelForCausalLM.from_pretrained, say) and pass the object"
        )
    models = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    found: list[Decoder] = []
    rejected: list[str] = []
    stuck: list[str] = []
    for name, module in models:
        owned = list(_own_attentions(module))
        wraps = any(_is_inside(other, name) for other, _ in models)
        around = [m for outer, m in models if outer == name or _is_inside(name, outer)]
        if owned and any(getattr(m.config, "is_encoder_decoder", False) for m in around):
            reason: str | None = "an encoder-decoder"
        else:
            reason = _why_no_decoder(module, owned, wraps)
        if reason is None:
            found.append(_describe(name, module, owned))
        elif reason:
            rejected.append(f"{_where(name, module)}: {reason}")
            if not reason.startswith(("an encoder:", _NO_MASK)):  # a tower may stay beside a decoder as it is
                stuck.append(rejected[-1])
    if not found:
        what = "; ".join(rejected) or "no transformers PreTrainedModel inside"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder with causal attention that could be made bidirectional ({what})"
        )
    found[0].in_the_way += stuck
    for decoder in found:
        decoder.builders = [
            m
            for n, m in models
            if _is_inside(decoder.name, n) and _forward_builds_mask(type(m)) and mask_parameter(type(m)) is not None
        ]
    return found


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _where(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _own_attentions(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Outermost attention modules of `model` that belong to no PreTrainedModel inside it."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, PreTrainedModel):
                continue
            if is_attention(child):
                yield path, child
            else:
                yield from walk(path, child)

    yield from walk("", model)


_NO_MASK = "an encoder, or causal in a way of its own: nothing makes a causal mask for its"


def _why_no_decoder(model: PreTrainedModel, attentions: list[tuple[str, nn.Module]], wraps: bool) -> str | None:
    """None if `model` is a decoder, "" if it is a mere wrapper, else why it can't be patched."""
    if not attentions:
        layers = None if wraps else _longest_list(model)
        if layers is None:
            return ""
        others = dict.fromkeys(name for layer in layers for name in _other_mixers(layer))
        if not others:
            return f"an encoder: its layers ({_kinds(layers)}) have no causal attention"
        return f"its layers ({_kinds(layers)} with {', '.join(others)}) have no attention"
    if all(getattr(a, "is_kv_shared_layer", False) for _, a in attentions):  # drafts for another model (Gemma 4's assistants)
        return f"all keys and values of its {_kinds(a for _, a in attentions)} come from another model"
    # Attention that was built causal says so (is_causal) on most versions; else the model's own mask code does.
    flags = [flag for _, a in attentions for flag in _said_causal(a)]
    decodes = getattr(model.config, "is_decoder", False)
    causal = not flags or any(flags) or decodes
    if causal and (builds_causal_mask(type(model)) or (decodes and _extends_mask(type(model)))):
        return None
    if causal_flags(model) or any(triangular_buffers(m) for m in (model, *(p for _, a in attentions for p in a.modules()))):
        return None
    return f"{_NO_MASK} {_kinds(a for _, a in attentions)}"


def causal_flags(module: nn.Module) -> tuple[str, ...]:
    """The names of the flags by which the module itself says that it is causal, whether or not it is swapped now."""
    return tuple(n for n in _FLAGS if before_swaps(module, n, module.__dict__.get(n)) is True)


def _said_causal(attention: nn.Module) -> list[bool]:
    """What the attention was built with, whether or not it is swapped now."""
    flags = []
    for module in attention.modules():
        flag = before_swaps(module, "is_causal", getattr(module, "is_causal", None))
        flag = getattr(module, "is_decoder", None) if flag is None else flag  # BERT, T5 and kin before they had the other
        if isinstance(flag, bool):
            flags.append(flag)
    return flags


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


def _functions(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if base is PreTrainedModel:
            return
        yield from (f for f in vars(base).values() if callable(f))


def _names_any(function: Any, *patterns: re.Pattern[str]) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and any(p.search(n) for n in _code_names(code) for p in patterns)


@per_class
def builds_causal_mask(cls: type) -> bool:
    return any(_names_any(f, _BUILDS_CAUSAL_MASK, _OLDER_CAUSAL_MASK) for f in _functions(cls))


@per_class
def _extends_mask(cls: type) -> bool:
    return any(_names_any(f, re.compile("get_extended_attention_mask")) for f in _functions(cls))


@per_class
def counts_mask(cls: type) -> bool:
    return any(_names_any(f, re.compile("^cumsum$")) for f in forwards(cls))


@per_class
def _forward_builds_mask(cls: type) -> bool:
    return any(_names_any(f, _BUILDS_CAUSAL_MASK) for f in forwards(cls))


def _longest_list(model: nn.Module) -> nn.ModuleList | None:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(lists, key=len) if lists else None


def _kinds(modules: Any) -> str:
    return ", ".join(dict.fromkeys(type(m).__name__ for m in modules))


def _describe(name: str, model: PreTrainedModel, attentions: list[tuple[str, nn.Module]]) -> Decoder:
    decoder = Decoder(name, model)
    lists: dict[str, nn.ModuleList] = {}
    for path, attention in attentions:
        decoder.attentions.append((path, attention, reach_of(attention, path, model.config, _heeds_kinds(original(type(model))))))
        steps = path.split(".")
        holders = [".".join(steps[:i]) for i in range(1, len(steps))]
        modules = accumulate(steps[:-1], getattr, initial=model)
        lists.update(next(({h: m} for h, m in zip(["", *holders], modules) if isinstance(m, nn.ModuleList)), {}))
    for holder, entries in lists.items():
        for index, layer in enumerate(entries):
            if layer is None:
                continue
            decoder.layers.append((f"{holder}.{index}", layer))
            foreign = _other_mixers(layer)
            if not foreign and not any(is_attention(m) for m in layer.modules()):
                foreign = [type(m).__name__ for m in layer.children() if not _POSITIONWISE.search(type(m).__name__)]
            if foreign:
                decoder.in_the_way.append(f"{holder}.{index} {type(layer).__name__} with {', '.join(foreign)}")
    return decoder


def _other_mixers(layer: nn.Module) -> list[str]:
    """Classes of what mixes tokens in `layer` by other means than attention; of a convolution, what holds it."""
    names = [type(m).__name__ for m in layer.modules() if _mixes_otherwise(m)]
    inside = [name for name in dict.fromkeys(names) if name != type(layer).__name__]
    return inside or names[:1]


def _mixes_otherwise(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children()):
        return True
    name = type(module).__name__
    return _RECURRENT.search(name) is not None and "norm" not in name.lower() and not is_attention(module)


@per_class
def _heeds_kinds(cls: type) -> bool:
    return any(_names_any(f, _KIND) for f in forwards(cls))


def reach_of(attention: nn.Module, path: str, config: Any, heeds_kinds: bool) -> Reach:
    """The window or chunk that the layer was trained with, read from where transformers keeps it.

    The layer's kind in `config.layer_types` decides whether it has one, where there is such a list and the model heeds
    it. The window is the module's own `sliding_window`, else the config's.
    """
    index = getattr(attention, "layer_idx", None)
    if index is None:
        digits = [s for s in path.split(".") if s.isdigit()]
        index = int(digits[0]) if digits else 0
    kinds = getattr(config, "layer_types", None) if heeds_kinds else None
    kind = kinds[index] if kinds and index < len(kinds) else None
    if kind is not None and "chunk" in kind:
        return Reach(chunk=getattr(config, "attention_chunk_size", None))
    if kind == "full_attention":
        return Reach()
    own = before_swaps(attention, "sliding_window", getattr(attention, "sliding_window", None))
    if own is not None or hasattr(attention, "sliding_window"):
        return Reach(window=own)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return Reach()
    if kind is not None:
        return Reach(window=window if "sliding" in kind else None)
    if index < getattr(config, "max_window_layers", 0):  # as each release that has windows there means it, but 4.39
        return Reach()
    return Reach(window=window)
